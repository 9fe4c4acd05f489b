"""What the tests share: the scripts' folder on the path, a small toy world with captions, saliency
and motion, and a way to run a script as a user does."""

import contextlib
import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "experiments")]
from tgm import arrays, training

torch.set_num_threads(1)
# Drawing the curves would take a quarter of a short run's time: test_curves.py does it.
NO_MATPLOTLIB = ROOT / "tests/no_matplotlib"
CLIP, BLIP = f"local-dir:{ROOT}/data/toy/clip", f"{ROOT}/data/toy/blip"
ENVIRONMENT = os.environ | {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # what is there already stays: packages may have been installed to a folder
    "PYTHONPATH": os.pathsep.join(
        [str(ROOT), str(NO_MATPLOTLIB), *filter(None, [os.environ.get("PYTHONPATH")])]
    ),
}
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")  # None: all
GPU_TESTS_ON_CPU = os.environ.get("TGM_GPU_TESTS") == "cpu"
os.environ.update(ENVIRONMENT)
# pytest-xdist's processes inherit the path; in them matplotlib is there
sys.path[:] = [folder for folder in sys.path if folder != str(NO_MATPLOTLIB)]


def pytest_configure(config):
    """Shows the GPU again where its own tests are asked for: see test_gpu.py."""
    if config.getoption("-m") == "gpu" and not GPU_TESTS_ON_CPU:
        for environment in (os.environ, ENVIRONMENT):
            del environment["CUDA_VISIBLE_DEVICES"]
            if GPUS is not None:
                environment["CUDA_VISIBLE_DEVICES"] = GPUS


def pytest_collection_modifyitems(config, items):
    asked = config.getoption("-m")
    if "slow" not in asked:
        skip(items, "slow", "slow: pytest -m slow")
    if asked != "gpu":
        skip(items, "gpu", "gpu: pytest -m gpu")
    elif not GPU_TESTS_ON_CPU and not torch.cuda.is_available():
        skip(items, "gpu", "no GPU that torch can use; TGM_GPU_TESTS=cpu tries them on a CPU")


def skip(items, marker, reason):
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


def run(script, *args, cwd=".", ranks=1, fails=False, process=False):
    """Runs `script.py args...` in the folder cwd and returns what it printed: its main() in this
    process, which saves the seconds of importing torch; in a process of its own with process=True,
    and under torchrun where ranks > 1.

    With fails=True it must end with one line for the user and no traceback; that line is
    returned."""
    args = [str(arg) for arg in args]
    if ranks == 1 and not process:
        return run_here(Path(script).stem if script.endswith(".py") else script, args, cwd, fails)
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        if ranks > 1
        else []
    )
    program = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
    done = subprocess.run(
        [sys.executable, *launcher, *program, *args],
        cwd=cwd,
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode in ((1, 2) if fails else (0,)), done.stdout + done.stderr
    assert not fails or "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1] if fails else done.stdout


def outputs(processes, timeout):
    """Waits for all processes -> [(stdout, stderr), ...]. They are read side by side: one that is
    not read stops when its pipe is full, and others may wait for it."""
    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(lambda process: process.communicate(timeout=timeout), processes))


def run_here(module, args, cwd, fails):
    before, out, errors, code = os.getcwd(), io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        os.chdir(cwd)
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(errors),
            mock.patch.object(training, "draw_own_curves", lambda path: None),
        ):
            importlib.import_module(module).main(args)
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        os.chdir(before)
        arrays.release()  # as the end of its process would
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if fails:
        code = errors.getvalue().strip() if code == 2 else code  # a wrong flag
        assert isinstance(code, str) and "\n" not in code, code
        return code
    assert code == 0, f"{code}\n{out.getvalue()}"
    return out.getvalue()


def made_once(request, name, make):
    """A folder that make(folder) fills: one process of pytest-xdist makes it, all use it."""
    base = request.getfixturevalue("tmp_path_factory").getbasetemp()
    if hasattr(request.config, "workerinput"):
        base = base.parent  # of all processes
    folder = base / name
    made = base / f"{name}.made"
    with FileLock(base / f"{name}.lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def world(request):
    """A folder with data/{train,val}.csv, 32 and 24 toy videos, their captions and their
    saliency. Not to be written to.
    """
    return made_once(request, "world", make_world)


def make_world(folder):
    run("data/toy.py", "--train", 32, "--val", 24, "--workers", 1, cwd=folder, process=True)
    clip = ["--clip", CLIP, "--moments", 8]
    motion = ["--cue", "motion", "--moments", 16, "--grid", 8]
    for split, process in (("train", True), ("val", False)):
        data = ["--data", f"data/{split}.csv", "--workers", 0]
        run("caption.py", *data, "--model", BLIP, cwd=folder, process=process)
        run("saliency.py", *data, *clip, cwd=folder, process=process)
        run("saliency.py", *data, *motion, cwd=folder)


@pytest.fixture
def copy(world, tmp_path):
    """A world that may be written to: the videos are linked, the rest copied."""
    (tmp_path / "data").mkdir()
    for path in (world / "data").iterdir():
        if path.name == "videos":
            (tmp_path / "data" / "videos").symlink_to(path)
        else:
            shutil.copy(path, tmp_path / "data" / path.name)
    return tmp_path
