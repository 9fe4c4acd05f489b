"""Everything that only a GPU can show.

    python -m pytest -m gpu                       on a machine with a GPU: ViT-B, some minutes
    TGM_GPU_TESTS=cpu python -m pytest -m gpu     the same tests at tiny sizes on a CPU, to try them

Other runs of the suite skip them, and hide the GPU from all other tests (tests/conftest.py).
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
import transformers as hf
from conftest import CLIP, ENVIRONMENT, GPU_TESTS_ON_CPU, ROOT, made_once, run
from safetensors.torch import save_file
from test_real_models import OPT, blip2
from torchvision.models.optical_flow import raft_small

import masking
import model as models

pytestmark = pytest.mark.gpu

DEVICE = "cpu" if GPU_TESTS_ON_CPU else "cuda"
SIZE = "tiny" if GPU_TESTS_ON_CPU else "base"
MACHINE = ["--device", DEVICE, "--workers", 0 if GPU_TESTS_ON_CPU else 4]
BF16 = ["--amp", "bf16"]
PRETRAIN = ["--size", SIZE, "--batch-size", 8, "--epochs", 4, "--warmup-epochs", 1, *MACHINE]
PRETRAIN += ["--log-every", 1, "--picture-every", 0, "--blr", 4e-3]


@pytest.fixture(autouse=True)
def free_memory():
    """Other processes need the memory that this one keeps."""
    yield
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def call(command, cwd):
    """Runs a command as a user does, with the GPU -> (what it printed, its messages)."""
    command = [str(word) for word in (sys.executable, *command)]
    done = subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT, text=True, capture_output=True, timeout=400
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-5000:]}"
    return done.stdout, done.stderr


def torchrun(script, *flags, cwd):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    return call([*launcher, ROOT / script, *flags], cwd)[0]


def read_log(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def losses(folder):
    """The losses of every step, float64 [steps, 2]."""
    lines = read_log(folder)
    return torch.tensor([[line["loss_mae"], line["loss_nce"]] for line in lines]).double()


# ---- pretraining ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(world, request):
    """The folder of a run by the mission's command, in bf16: 8 steps."""

    def make(out):
        flags = ["--mask", "text", *PRETRAIN, "--max-steps", 8, "--out", out]
        if DEVICE == "cpu":
            flags += BF16
        printed = torchrun("pretrain.py", *flags, cwd=world)
        assert f"device       {'cpu' if DEVICE == 'cpu' else 'cuda:0'}" in printed
        assert "amp bf16, 1 ranks" in printed  # which a GPU chooses by itself

    return made_once(request, "first", make)


def test_the_mission_command_learns(first):
    found = losses(first)
    assert len(found) == 8 and found.isfinite().all()
    assert 0.8 < found[0, 0] < 1.6 and found[-1, 0] < found[0, 0]
    assert all(math.isfinite(line["grad_norm"]) for line in read_log(first))


@pytest.mark.parametrize(
    "flags",
    [
        ["--amp", "fp16"],
        ["--amp", "off"],
        ["--amp", "bf16", "--compile"],
        ["--amp", "fp16", "--compile"],
        ["--amp", "bf16", "--checkpointing"],
        ["--amp", "bf16", "--compile", "--checkpointing"],
        ["--amp", "bf16", "--accum", 2, "--batch-size", 4],
    ],
    ids=lambda flags: " ".join(str(flag) for flag in flags),
)
def test_every_way_to_run_gives_the_same_losses(world, first, tmp_path, flags):
    flags = ["--mask", "text", *PRETRAIN, "--max-steps", 4, *flags, "--out", tmp_path]
    torchrun("pretrain.py", *flags, cwd=world)
    found = losses(tmp_path)
    expected = losses(first)[:4]
    assert torch.allclose(found[:, 0], expected[:, 0], rtol=0.02)
    if "--accum" not in flags:  # whose contrastive loss has fewer negatives
        assert torch.allclose(found[:, 1], expected[:, 1], rtol=0.05)


@pytest.mark.parametrize("mask", masking.MASKS)
def test_every_mask_trains(world, tmp_path, mask):
    flags = ["--mask", mask, *PRETRAIN, *BF16, "--max-steps", 2, "--out", tmp_path]
    flags += ["--decoder-keep", 0.5, "--repeat", 2, "--batch-size", 4]
    torchrun("pretrain.py", *flags, cwd=world)
    assert losses(tmp_path).isfinite().all()


def test_a_resumed_run_goes_on_as_an_uninterrupted_one(world, first, tmp_path):
    flags = ["--mask", "text", *PRETRAIN, *BF16, "--out", tmp_path]
    torchrun("pretrain.py", *flags, "--max-steps", 5, cwd=world)
    torchrun("pretrain.py", *flags, "--max-steps", 8, "--resume", "auto", cwd=world)
    found = read_log(tmp_path)
    assert [line["step"] for line in found] == list(range(1, 9))
    for name, tolerance in (("loss_mae", 1e-2), ("loss_nce", 3e-2), ("lr", 1e-9)):
        for ours, its in zip(found, read_log(first), strict=True):
            assert ours[name] == pytest.approx(its[name], rel=tolerance), (name, ours["step"])


ONE_RANK = """
import sys
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import pretrain
from tgm import run, training


class Together(training.Machine):
    '''One rank, which does all that several do.'''

    def join(self):
        run.join_ranks("nccl" if self.on_gpu else "gloo", timeout=training.LONGEST_WAIT)

    def wrap(self, model):
        return DistributedDataParallel(model, device_ids=[self.device] if self.on_gpu else None)

    def leave(self):
        run.wait_for_ranks()
        dist.destroy_process_group()


class Stop(run.StopSignal):
    def __init__(self, ranks):
        super().__init__()
        self._group = dist.new_group(backend="gloo")


pretrain.Machine = Together
pretrain.StopSignal = Stop
run.launch(lambda: pretrain.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "flags",
    [[], ["--compile"], ["--compile", "--checkpointing"], ["--nce-weight", 0]],
    ids=lambda flags: " ".join(str(flag) for flag in flags) or "plain",
)
def test_nccl_and_ddp_of_one_rank(world, first, tmp_path, flags):
    """The gathering, DistributedDataParallel, and gloo's group beside NCCL's: the same losses."""
    script = tmp_path / "one_rank.py"
    script.write_text(ONE_RANK)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    ours = [*PRETRAIN, *BF16, "--max-steps", 4, "--out", tmp_path, *flags]
    call([*launcher, script, "--mask", "text", *ours], world)
    found = losses(tmp_path)
    expected = losses(first)[:4]
    assert torch.allclose(found[:1], expected[:1], rtol=0.02)
    if "--nce-weight" not in flags:
        assert torch.allclose(found[:, 0], expected[:, 0], rtol=0.02)


# ---- the step, piece by piece --------------------------------------------------------------------


def sample_maps(batch, grid):
    """Random noise and token maps of a batch, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(batch, math.prod(grid), generator=generator)
    saliency = torch.rand(batch, *grid, generator=generator).half()
    motion = torch.randn(batch, grid[0], 2, *grid[1:], generator=generator) / 20
    return noise, {"saliency": saliency, "motion": motion}


@pytest.mark.parametrize("mask", masking.MASKS)
def test_masks_equal_those_of_the_cpu(mask):
    """Bit for bit where a mask only sorts. The motion masks add up the motion, which a GPU may
    round in another way: there a window or a few tokens may change places."""
    grid = (8, 14, 14)
    noise, maps = sample_maps(64, grid)
    need = masking.NEEDS[mask]
    maps = {need: maps[need]} if need else {}
    on_gpu = {name: value.to(DEVICE) for name, value in maps.items()}
    for ratio in (0.9, 0.6):
        expected = masking.make_mask(mask, ratio, 64, grid, noise=noise, **maps)
        found = masking.make_mask(mask, ratio, 64, grid, noise=noise.to(DEVICE), **on_gpu).cpu()
        assert (found.sum(1) == masking.masked_count(ratio, grid)).all()
        if need == "motion":
            assert (found != expected).float().mean() < 2e-3
        else:
            assert torch.equal(found, expected)
        some = masking.some_masked(expected.to(DEVICE), noise.to(DEVICE), 300)
        assert torch.equal(some.cpu(), masking.some_masked(expected, noise, 300))


def test_maps_are_cut_as_on_the_cpu():
    generator = torch.Generator().manual_seed(0)
    corner = 0.3 * torch.rand(16, 2, generator=generator)
    place = [
        ((torch.arange(8) + 0.5) / 8).expand(16, 8),
        torch.cat([corner, corner + 0.7], dim=1),
        torch.rand(16, generator=generator) < 0.5,
    ]
    maps = torch.rand(16, 16, 14, 14, generator=generator).half()
    field = torch.randn(16, 32, 2, 14, 14, generator=generator).half()
    seconds = torch.full((16,), 10.0)
    grid = (8, 14, 14)
    on_gpu = [value.to(DEVICE) for value in place]
    found = masking.cut_maps(maps.to(DEVICE), *on_gpu, grid).cpu()
    assert torch.allclose(found, masking.cut_maps(maps, *place, grid), atol=1e-5)
    found = masking.cut_motion(field.to(DEVICE), *on_gpu, grid, seconds.to(DEVICE)).cpu()
    assert torch.allclose(found, masking.cut_motion(field, *place, grid, seconds), atol=1e-4)


def loss_and_gradients(device, amp):
    """Both losses of two clips, and the gradient of every parameter, on the CPU."""
    torch.manual_seed(0)
    model = models.VideoMAE(SIZE)
    c = model.config
    generator = torch.Generator().manual_seed(1)
    shape = (2, 3, c["frames"], c["image_size"], c["image_size"])
    clip = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    noise = torch.rand(2, model.num_tokens, generator=generator)
    text = torch.randn(2, 512, generator=generator)
    mask = masking.make_mask("random", 0.75, 2, model.grid, noise=noise)
    model.to(device)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
        output = model(models.normalize(clip.to(device)), mask.to(device), text.to(device))
    (output.loss_mae + output.loss_nce).backward()
    gradients = {name: p.grad.cpu().double() for name, p in model.named_parameters()}
    return torch.stack(list(output)).detach().cpu().double(), gradients


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bf16"])
def test_losses_and_gradients_are_near_the_cpus(amp):
    expected, expected_gradients = loss_and_gradients("cpu", False)
    found, gradients = loss_and_gradients(DEVICE, amp)
    assert torch.allclose(found, expected, rtol=1e-2 if amp else 1e-4)
    whole = torch.cat([gradient.flatten() for gradient in expected_gradients.values()])
    ours = torch.cat([gradient.flatten() for gradient in gradients.values()])
    assert (ours - whole).norm() < (0.05 if amp else 1e-3) * whole.norm()
    if not amp:
        for name, gradient in gradients.items():
            apart = (gradient - expected_gradients[name]).norm()
            assert apart <= 1e-2 * expected_gradients[name].norm() + 1e-6, name


COUNT_WAITS = """
import runpy
import sys

import torch

if torch.cuda.is_available():
    torch.cuda.set_sync_debug_mode("warn")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
WAITS = "called a synchronizing CUDA operation"


@pytest.mark.parametrize(
    "command",
    [
        ["pretrain.py", "--mask", "text", *BF16],
        ["pretrain.py", "--mask", "flow", *BF16, "--decoder-keep", 0.5, "--accum", 2],
        ["pretrain.py", "--mask", "motion", "--amp", "fp16", "--checkpointing"],
        ["finetune.py", "--val", "data/val.csv", *BF16, "--repeat", 2, "--views", 1, 1],
        ["finetune.py", "--val", "data/val.csv", "--amp", "fp16", "--repeat", 2, "--views", 1, 1],
    ],
    ids=lambda command: " ".join(str(word) for word in command[:6]),
)
def test_the_host_waits_at_log_lines_alone(world, tmp_path, command):
    """Two runs of different length have one log line each: the same number of waits."""
    script = tmp_path / "count_waits.py"
    script.write_text(COUNT_WAITS)
    counts = []
    for steps in (3, 7):
        flags = ["--data", "data/train.csv", *MACHINE, "--batch-size", 2, "--log-every", 100]
        flags += ["--size", "tiny", "--epochs", 2, "--max-steps", steps, "--out", tmp_path / "run"]
        flags += ["--resume", "none"]
        if command[0] == "pretrain.py":
            flags += ["--picture-every", 0]
        begin = ["-W", "always", script, ROOT / command[0]]
        _, messages = call([*begin, *flags, *command[1:]], world)
        counts.append(messages.count(WAITS))
    assert counts[0] == counts[1], counts
    assert counts[0] > 0 or DEVICE == "cpu"  # the log line itself


# ---- the other stages ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [BF16, ["--amp", "fp16"], [*BF16, "--compile", "--checkpointing"]],
    ids=lambda flags: " ".join(flags),
)
def test_finetuning(world, first, tmp_path, flags):
    ours = ["--checkpoint", first / "checkpoint.pt", "--batch-size", 8, "--epochs", 1, "--no-flip"]
    ours += ["--warmup-epochs", 0, "--views", 2, 3, "--log-every", 1, *MACHINE, "--out", tmp_path]
    torchrun("finetune.py", *ours, *flags, cwd=world)
    lines = [line for line in read_log(tmp_path) if "loss" in line]
    assert len(lines) == 4 and all(0 < line["loss"] < 10 for line in lines)
    found = json.loads((tmp_path / "test.json").read_text())
    assert found["videos"] == 24 and found["unreadable"] == 0 and 0 <= found["top1"] <= 1


def test_the_probes(world, first, tmp_path):
    flags = ["--checkpoint", first / "checkpoint.pt", "--attentive", "--seeds", 1, *MACHINE]
    torchrun("linprobe.py", *flags, "--batch-size", 8, "--out", tmp_path, cwd=world)
    found = json.loads((tmp_path / "label.json").read_text())
    assert all(0 <= found[probe] <= 1 for probe in ("linear", "knn", "attentive"))


def full_size_blip(folder):
    """BLIP-base with random weights, and a vocabulary of as many made-up words."""
    text = {"num_attention_heads": 12}
    vision = {"image_size": 384}
    if DEVICE == "cpu":
        text |= {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        text |= {"intermediate_size": 64, "encoder_hidden_size": 32, "projection_dim": 32}
        vision = {"image_size": 32, "hidden_size": 32, "num_hidden_layers": 1}
        vision |= {"num_attention_heads": 2, "intermediate_size": 64}
    config = hf.BlipConfig(text_config=text, vision_config=vision)
    hf.BlipForConditionalGeneration(config).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
    words += [f"word{i}" for i in range(config.text_config.vocab_size - len(words))]
    tokenizer = hf.BertTokenizerFast(vocab={word: index for index, word in enumerate(words)})
    size = {"height": vision["image_size"], "width": vision["image_size"]}
    hf.BlipProcessor(hf.BlipImageProcessor(size=size), tokenizer).save_pretrained(folder)


CAPTIONERS = {
    "blip-base": full_size_blip,
    "blip2-opt": lambda folder: blip2(folder, hf.OPTConfig(**OPT)),
}


@pytest.mark.parametrize("kind", CAPTIONERS)
def test_captions(world, tmp_path, kind):
    torch.manual_seed(0)
    CAPTIONERS[kind](tmp_path / "model")
    flags = ["--data", "data/val.csv", "--model", tmp_path / "model", "--batch-size", 8, *MACHINE]
    flags += ["--max-tokens", 8, "--out", tmp_path / "val.captions.jsonl"]
    printed, _ = call([ROOT / "caption.py", *flags], world)
    assert f"on {'cpu, float32' if DEVICE == 'cpu' else 'cuda:0, bfloat16'}: 24 videos" in printed
    lines = (tmp_path / "val.captions.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["captions"]) for line in lines] == [3] * 24


def full_size_clip(folder):
    """ViT-B-16 of open_clip with random weights, in a folder as they are published."""
    config = open_clip.get_model_config("ViT-B-16")
    if DEVICE == "cpu":
        config["vision_cfg"] |= {"layers": 2, "width": 64, "image_size": 32}
        config["text_cfg"] |= {"layers": 1, "width": 64, "heads": 2}
    folder.mkdir()
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "size": config["vision_cfg"]["image_size"]}
    about = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")


@pytest.mark.parametrize("dense", ["last", "value", "self"])
def test_saliency_of_text(world, tmp_path, dense):
    full_size_clip(tmp_path / "clip")
    flags = ["--data", "data/val.csv", "--clip", f"local-dir:{tmp_path}/clip", "--dense", dense]
    flags += ["--moments", 4, "--out", tmp_path / "val", *MACHINE]
    printed, _ = call([ROOT / "saliency.py", *flags], world)
    assert "24 of 24 videos" in printed


def test_saliency_is_near_the_cpus(world, tmp_path):
    import numpy as np

    maps = []
    for device in ("cpu", DEVICE):
        flags = ["--data", "data/val.csv", "--clip", CLIP, "--moments", 4, "--workers", 0]
        run("saliency.py", *flags, "--device", device, "--out", tmp_path / device, cwd=world)
        maps.append(np.load(tmp_path / f"{device}.saliency.npy").astype(float))
        (tmp_path / f"{device}.saliency.npy").unlink()
    assert abs(maps[0] - maps[1]).mean() < 0.01


def test_motion_by_raft(world, tmp_path):
    torch.manual_seed(0)
    torch.save(raft_small(weights=None).state_dict(), tmp_path / "raft.pth")
    flags = ["--data", "data/val.csv", "--cue", "motion", "--flow", "raft", "--grid", 8]
    flags += ["--flow-weights", tmp_path / "raft.pth", "--out", tmp_path / "val", *MACHINE]
    flags += ["--moments", 2 if DEVICE == "cpu" else 16]
    flags += ["--image-size", 128 if DEVICE == "cpu" else 256]
    printed, _ = call([ROOT / "saliency.py", *flags], world)
    assert "24 of 24 videos" in printed


def test_a_picture_is_drawn(world, first, tmp_path):
    flags = ["--mask", "text", *PRETRAIN, *BF16, "--max-steps", 1, "--picture-every", 1]
    torchrun("pretrain.py", *flags, "--out", tmp_path, cwd=world)
    assert (tmp_path / "reconstruction_000001.png").exists()
