"""What the tests share: the scripts' folder on the path, a small toy world with captions and saliency, and a way to run a
script as a user does."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
torch.set_num_threads(1)
CLIP, BLIP = f"local-dir:{ROOT}/data/toy/clip", f"{ROOT}/data/toy/blip"
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def run(*command, cwd=".", ranks=1, fails=False):
    """Runs `script.py args...` in a process of its own, under torchrun where ranks > 1; returns what it printed.

    With fails=True it must exit with 1 and one line on stderr, without a traceback; that line is returned."""
    script, *rest = (str(part) for part in command)
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=0"] if ranks > 1 else []
    done = subprocess.run([sys.executable, *launcher, str(ROOT / script), *rest], cwd=cwd, env=ENVIRONMENT, text=True,
                          capture_output=True, timeout=300)
    if fails:
        assert done.returncode == 1, done.stdout + done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        return done.stderr.strip().splitlines()[-1]
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with data/{train,val}.csv, 32 and 24 toy videos, their captions and their saliency. Not to be written to."""
    folder = tmp_path_factory.mktemp("world")
    run("data/toy.py", "--train", 32, "--val", 24, "--workers", 1, cwd=folder)
    for split in ("train", "val"):
        run("caption.py", f"data/{split}.csv", "--model", BLIP, "--workers", 0, cwd=folder)
        run("saliency.py", f"data/{split}.csv", "--clip", CLIP, "--moments", 8, "--workers", 0, cwd=folder)
    return folder


@pytest.fixture
def copy(world, tmp_path):
    """A world that may be written to: the videos are linked, the rest copied."""
    import shutil
    (tmp_path / "data").mkdir()
    for path in (world / "data").iterdir():
        if path.name == "videos":
            (tmp_path / "data" / "videos").symlink_to(path)
        else:
            shutil.copy(path, tmp_path / "data" / path.name)
    return tmp_path
