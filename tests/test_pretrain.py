"""Stage 3: schedules and samples by value, then the command line: ranks, workers, resuming,
every choice, every refusal.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, outputs, run

import masking
import pretrain
from tgm import checkpoints, checks, guides, resume, sampling
from tgm.run import RunError

TINY = (
    "--size tiny --batch-size 8 --epochs 3 --warmup-epochs 1 --blr 2e-3 "
    "--log-every 2 --workers 0 --picture-every 0"
).split()


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_learning_rate():
    rate = lambda step: pretrain.learning_rate(step, 1.0, warmup=10, total=110, floor=0.0)
    assert rate(0) == 0.1 and rate(9) == 1.0 and rate(10) == 1.0
    assert rate(60) == pytest.approx(0.5) and rate(109) == pytest.approx(
        0.5 * (1 + np.cos(np.pi * 0.99))
    )
    assert pretrain.learning_rate(110, 1.0, 10, 110, floor=0.2) == pytest.approx(0.2)
    assert pretrain.learning_rate(0, 1.0, 0, 10, floor=0.2) == 1.0


@pytest.mark.parametrize("warmup", [0.5, 2.5, 10 / 3])
def test_a_warm_up_of_a_fraction_of_a_step_stays_at_the_peak(warmup):
    rates = [pretrain.learning_rate(step, 1e-3, warmup, 20, floor=0.0) for step in range(20)]
    assert max(rates) <= 1e-3 and rates[0] == min(1e-3, 1e-3 / warmup)
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_neither_pretraining_nor_probing_imports_torchvision():
    """It would cost each of their processes more than a second at the start."""
    code = (
        "import sys, linprobe, pretrain; "
        "print({'torchvision', 'torch._dynamo'} & sys.modules.keys() or 'none')"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout == "none\n", done.stderr


def test_ranks_side_by_side_are_the_global_batch():
    rows = np.arange(100, 137)
    one = list(sampling.EpochBatches(rows, 12, 3, seed=4, rank=0, ranks=1))
    two = [list(sampling.EpochBatches(rows, 6, 3, seed=4, rank=rank, ranks=2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*two)] == one
    drawn = [row for batch in one for _, row in batch]
    assert len(set(drawn)) == 36 and set(drawn) <= set(rows)
    batches = sampling.EpochBatches(rows, 12, 3, seed=4, rank=0, ranks=1)
    batches.start = 1
    assert list(batches) == one[1:] and len(batches) == 2
    batches.epoch, batches.start = 1, 0
    assert list(batches) != one and all(epoch == 1 for batch in batches for epoch, _ in batch)


def test_multi_scale_crop():
    assert {sampling.multi_scale_crop(1, 1) for _ in range(50)} == {(0, 0, 1, 1)}
    torch.manual_seed(0)
    crops = [sampling.multi_scale_crop(100, 200) for _ in range(2000)]
    assert all(0 <= top <= 100 - h and 0 <= left <= 200 - w for top, left, h, w in crops)
    sides = {(h, w) for _, _, h, w in crops}
    assert sides == {
        (a, b)
        for a in (100, 87, 75, 66)
        for b in (100, 87, 75, 66)
        if abs((100, 87, 75, 66).index(a) - (100, 87, 75, 66).index(b)) <= 1
    }
    assert {left for _, left, h, w in crops if (h, w) == (100, 100)} == {0, 25, 50, 75, 100}


def clips(world, **flags):
    args = pretrain.parse_args(
        ["--data", str(world / "data/train.csv"), "--size", "tiny", "--stride", "2"]
    )
    vars(args).update({"frames": 8, "image_size": 64} | flags)
    videos, rows, arrays, _ = guides.open_data(args.data, args.mask, args.nce_weight)
    return pretrain.make_clips(videos, rows, (4, 4, 4), arrays, args)


def test_a_sample_is_a_function_of_seed_epoch_row_and_repeat(world):
    data, again = clips(world, repeat=3, flip=True), clips(world, repeat=3, flip=True)
    first = data[2, 7]
    data[1, 3]  # what was asked before must not matter
    torch.manual_seed(99)
    for key, value in again[2, 7].items():
        assert np.array_equal(np.asarray(value), np.asarray(first[key])), key
    assert first["clip"].shape == (3, 3, 8, 64, 64) and first["clip"].dtype == torch.uint8
    assert not torch.equal(first["noise"][0], first["noise"][1])
    for other in (data[1, 7], clips(world, repeat=3, flip=True, seed=1)[2, 7]):
        assert not torch.equal(other["noise"], first["noise"])
    # repeats only add
    assert torch.equal(clips(world, repeat=1, flip=True)[2, 7]["clip"][0], first["clip"][0])


def test_a_sample_brings_the_caption_it_was_given(world):
    data = clips(world, repeat=8)
    sample = data[0, 5]
    for text, maps in zip(sample["text"], sample["saliency"]):
        k = [
            np.array_equal(maps, data.saliency[5, k])
            and np.array_equal(text, data.text[5, k].astype(np.float32))
            for k in range(3)
        ]
        assert any(k)


def test_the_mission_command_with_two_ranks(copy):
    """`torchrun --nproc_per_node=2 pretrain.py --mask text`, data at its default place: learns,
    logs, saves, draws.
    """
    out = run(
        "pretrain.py",
        *(
            "--mask text --size tiny --batch-size 8 --epochs 4 --workers 1 "
            "--log-every 1 --picture-every 2 --blr 0.02 --warmup-epochs 1"
        ).split(),
        cwd=copy,
        ranks=2,
    )
    assert (
        "60 of 144 visible: mask text at 0.6" in out
        and "16 = 8 videos x 1 repeats x 1 accumulated x 2 ranks" in out
    )
    lines = log(copy / "runs/text")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert set(lines[0]) == {
        "step",
        "epoch",
        "loss_mae",
        "loss_nce",
        "lr",
        "grad_norm",
        "data_ms",
        "step_ms",
        "clips_per_s",
        "left_s",
        "skipped",
    }
    assert lines[-1]["loss_mae"] < lines[0]["loss_mae"] - 0.02
    # trivial: about 1; chance: ln 16
    assert 0.9 < lines[0]["loss_mae"] < 1.5 and 2 < lines[0]["loss_nce"] < 4
    assert (copy / "runs/text/reconstruction_000004.png").stat().st_size > 1000
    args = json.loads((copy / "runs/text/args.json").read_text())
    assert (args["mask"], args["frames"], args["stride"], args["image_size"]) == ("text", 8, 2, 48)


def test_two_ranks_equal_one_with_the_same_global_batch(copy):
    flags = [*TINY, "--max-steps", 3]
    flags[flags.index("--batch-size") + 1] = 16
    run("pretrain.py", *flags, "--out", "one", cwd=copy)
    flags[flags.index("--batch-size") + 1] = 8
    run("pretrain.py", *flags, "--out", "two", cwd=copy, ranks=2)
    one, two = weights(copy / "one"), weights(copy / "two")
    for key in one:
        assert torch.allclose(one[key], two[key], rtol=1e-3, atol=2e-5), key
    for a, b in zip(log(copy / "one"), log(copy / "two")):
        assert a["loss_mae"] == pytest.approx(b["loss_mae"], rel=1e-5) and a[
            "loss_nce"
        ] == pytest.approx(b["loss_nce"], rel=1e-5)


def test_accumulation_equals_one_large_batch(copy):
    # the contrastive loss knows only the batch it sees
    flags = [*TINY, "--max-steps", 2, "--nce-weight", 0]
    run("pretrain.py", *flags, "--accum", 2, "--out", "two", cwd=copy)
    flags[flags.index("--batch-size") + 1] = 16
    run("pretrain.py", *flags, "--out", "one", cwd=copy)
    one, two = weights(copy / "one"), weights(copy / "two")
    assert all(
        torch.allclose(one[key], two[key], rtol=1e-3, atol=2e-5)
        for key in one
        if not key.startswith("contrastive")
    )


def test_resuming_and_workers_change_nothing(copy):
    repeated = (*TINY, "--repeat", 2, "--blr", 4e-3, "--flip")
    run("pretrain.py", *repeated, "--out", "whole", cwd=copy)
    run("pretrain.py", *repeated, "--out", "parts", "--max-steps", 6, "--resume", "auto", cwd=copy)
    # logged after the last checkpoint, lost in a kill
    (copy / "parts/log.jsonl").open("a").write('{"step": 7}\n')
    flags = [*repeated, "--out", "parts", "--resume", "auto"]
    flags[flags.index("--workers") + 1] = 4
    assert "from step 6" in run("pretrain.py", *flags, cwd=copy)
    whole, parts = weights(copy / "whole"), weights(copy / "parts")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert (
        [line["step"] for line in log(copy / "parts")]
        == [line["step"] for line in log(copy / "whole")]
        == [2, 4, 6, 8, 10, 12]
    )
    assert [line["loss_mae"] for line in log(copy / "parts")] == [
        line["loss_mae"] for line in log(copy / "whole")
    ]
    assert "already at step 12" in run("pretrain.py", *flags, cwd=copy)
    line = run("pretrain.py", *repeated, "--out", "whole", cwd=copy, fails=True)
    assert line == (
        "whole/checkpoint.pt is there already: --resume auto goes on from it, --resume none begins "
        "again and keeps it as checkpoint.old.pt, --out writes elsewhere"
    )
    # not an offer to go on
    line = run("pretrain.py", *TINY, "--mask", "tube", "--out", "whole", cwd=copy, fails=True)
    assert line.startswith("whole/checkpoint.pt: another run: ")
    assert (
        "--repeat was 2, is 1; " in line
        and "--mask was text, is tube" in line
        and "--resume auto" not in line
    )


@pytest.mark.parametrize("mask", ["text", "tube", "random"])
def test_decoding_half_of_the_masked_tokens(copy, monkeypatch, mask):
    """Half the masked tokens of every sample reach the decoder; resuming changes nothing;
    --decoder-keep 1 is the default.
    """
    counts, decode = [], pretrain.models.VideoMAE.decode
    monkeypatch.setattr(
        pretrain.models.VideoMAE,
        "decode",
        lambda self, tokens, seen, hidden: (
            counts.append((seen.shape[1], hidden.shape[1])) or decode(self, tokens, seen, hidden)
        ),
    )
    flags = (*TINY, "--mask", mask, "--mask-ratio", 0.6, "--epochs", 2)
    half = (*flags, "--decoder-keep", 0.5)
    assert (
        "60 of 144 visible" in (out := run("pretrain.py", *half, "--out", "whole", cwd=copy))
        and "; 42 reconstructed" in out
    )
    assert set(counts) == {(60, 42)}
    run("pretrain.py", *half, "--out", "parts", "--max-steps", 3, cwd=copy)
    run("pretrain.py", *half, "--out", "parts", "--resume", "auto", cwd=copy)
    whole, parts = weights(copy / "whole"), weights(copy / "parts")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    run("pretrain.py", *flags, "--out", "default", cwd=copy)
    assert counts[-1] == (60, 84)
    run("pretrain.py", *flags, "--decoder-keep", 1, "--out", "one", cwd=copy)
    default, one = weights(copy / "default"), weights(copy / "one")
    assert all(torch.equal(default[key], one[key]) for key in one) and not torch.equal(
        one["mask_token"], whole["mask_token"]
    )


def test_weight_zero_monitors_and_leaves_the_encoder_alone(copy):
    """With --nce-weight 0 everything but the head is as if there were no captions, gradient
    clipping included.
    """
    flags = (*TINY, "--mask", "tube", "--nce-weight", 0, "--clip-grad", 0.5, "--max-steps", 4)
    run("pretrain.py", *flags, "--out", "monitored", cwd=copy)
    (copy / "data/train.text.npy").unlink()
    assert "no text array" in run("pretrain.py", *flags, "--out", "alone", cwd=copy)
    monitored, alone = weights(copy / "monitored"), weights(copy / "alone")
    assert all(
        torch.equal(monitored[key], alone[key])
        for key in alone
        if not key.startswith("contrastive.")
    )
    assert log(copy / "monitored")[0]["loss_nce"] > 1 and log(copy / "alone")[0]["loss_nce"] is None


@pytest.mark.parametrize(
    "flags",
    [
        *[("--mask", mask) for mask in masking.MASKS],
        *[
            ("--mask", mask, "--nce-weight", 0, "--repeat", 2, "--blr", 4e-3, "--flip")
            for mask in masking.MASKS
        ],
        ("--mask", "random", "--mask-ratio", 0.75),
        ("--amp", "bf16"),
        ("--amp", "fp16"),
        ("--amp", "off"),
        ("--checkpointing",),
        ("--frames", 4, "--image-size", 96, "--no-flip"),
        ("--clip-grad", 0, "--device", "cpu"),
    ],
    ids=str,
)
def test_every_choice_trains(world, tmp_path, flags):
    run(
        "pretrain.py",
        *TINY,
        "--data",
        world / "data/train.csv",
        "--out",
        tmp_path,
        *flags,
        "--max-steps",
        2,
    )
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


@pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None,
    reason="torch.compile needs a C++ compiler",
)
def test_compiled_it_is_the_same(world, tmp_path):
    flags = (*TINY, "--data", world / "data/train.csv", "--max-steps", 2)
    run("pretrain.py", *flags, "--out", tmp_path / "eager")
    run("pretrain.py", *flags, "--out", tmp_path / "compiled", "--compile")
    eager, compiled = weights(tmp_path / "eager"), weights(tmp_path / "compiled")
    assert eager.keys() == compiled.keys()
    assert all(torch.allclose(eager[key], compiled[key], atol=1e-4) for key in eager)


def test_other_sizes_start(world, tmp_path):
    """Every size builds and takes a step; the published sizes on small clips."""
    for size in ("small", "base"):
        run(
            "pretrain.py",
            *TINY,
            "--size",
            size,
            *"--frames 2 --image-size 64 --batch-size 2 --max-steps 1".split(),
            "--data",
            world / "data/train.csv",
            "--out",
            tmp_path / size,
        )
    with torch.device("meta"):
        for size in ("large", "huge"):
            pretrain.models.VideoMAE(size)


def test_init_starts_from_a_checkpoint(world, tmp_path):
    flags = (*TINY, "--data", world / "data/train.csv", "--max-steps", 2)
    run("pretrain.py", *flags, "--out", tmp_path / "a")
    start = run(
        "pretrain.py", *flags, "--out", tmp_path / "b", "--init", tmp_path / "a/checkpoint.pt"
    )
    assert (
        "every key" in start
        and log(tmp_path / "b")[0]["loss_mae"] < log(tmp_path / "a")[0]["loss_mae"]
    )
    line = run(
        "pretrain.py",
        *flags,
        "--out",
        tmp_path / "c",
        "--size",
        "small",
        "--image-size",
        32,
        "--init",
        tmp_path / "a/checkpoint.pt",
        fails=True,
    )
    assert "mask_token: file [1, 1, 96], model [1, 1, 192]; " in line and " more" in line


@pytest.mark.parametrize(
    "workers, number", [(0, signal.SIGTERM), (2, signal.SIGTERM), (2, signal.SIGINT)]
)
def test_a_signal_saves_and_ends_the_run_by_itself(world, tmp_path, workers, number):
    """As a scheduler or a terminal sends it: to the whole process group, the loader's workers
    included.
    """
    command = [
        "pretrain.py",
        *TINY,
        "--epochs",
        1000,
        "--workers",
        workers,
        "--data",
        world / "data/train.csv",
        "--out",
        tmp_path,
    ]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / command[0]), *map(str, command[1:])],
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    while not process.stdout.readline().startswith("step "):
        assert process.poll() is None
    os.killpg(process.pid, number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == -number and f"{number.name}: saved" in out, errors
    step = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
    assert step == log(tmp_path)[-1]["step"] < 4000


def test_bad_videos_give_their_place_to_others(copy):
    (copy / "data/bad.mp4").write_bytes(b"not a video")
    lines = (copy / "data/train.csv").read_text().splitlines()
    lines[4] = "bad.mp4" + lines[4][lines[4].index(",") :]
    (copy / "data/train.csv").write_text("\n".join(lines) + "\n")
    flags = (*TINY, "--mask", "tube", "--nce-weight", 0, "--companions", "none")
    assert "32 of 32 videos usable" in run("pretrain.py", *flags, "--out", "a", cwd=copy)
    assert log(copy / "a")[-1]["skipped"] == 1
    assert "more than --max-bad 0.01: bad.mp4" in run(
        "pretrain.py", *flags, "--out", "b", "--max-bad", 0.01, cwd=copy, fails=True
    )


def test_rows_without_saliency_are_left_out(copy):
    array = np.load(copy / "data/train.saliency.npy", mmap_mode="r+")
    array[[3, 9]] = np.nan
    array.flush()
    assert "30 of 32 videos usable" in run("pretrain.py", *TINY, "--max-steps", 1, cwd=copy)


def test_a_loss_that_is_not_finite_stops_with_names(copy):
    line = run("pretrain.py", *TINY, "--nce-weight", 1e39, cwd=copy, fails=True)
    assert "step 1: the loss or its gradient is not finite" in line and "videos/train/000" in line
    assert not (copy / "runs/text/checkpoint.pt").exists()


def test_refusals_name_the_command_that_mends(copy):
    assert "python data/toy.py" in run("pretrain.py", cwd=copy / "data", fails=True, process=True)
    assert "lower --batch-size" in run(
        "pretrain.py", *TINY, "--batch-size", 33, cwd=copy, fails=True
    )
    assert "frames 5: expected a positive multiple of 2" in run(
        "pretrain.py", *TINY, "--frames", 5, cwd=copy, fails=True
    )
    assert "nowhere.pt: no checkpoint there" in run(
        "pretrain.py", *TINY, "--init", "nowhere.pt", cwd=copy, fails=True
    )
    if not torch.cuda.is_available():
        assert "no GPU" in run("pretrain.py", *TINY, "--device", "cuda", cwd=copy, fails=True)
    for keep in (0, 1.1):
        assert "--decoder-keep" in run(
            "pretrain.py", *TINY, "--decoder-keep", keep, cwd=copy, fails=True
        )
    assert "mask ratio 0.01" in run(
        "pretrain.py", *TINY, "--mask-ratio", 0.01, cwd=copy, fails=True
    )
    captions = (copy / "data/train.captions.jsonl").read_text()
    (copy / "data/train.captions.jsonl").write_text(captions.replace("red", "blue"))
    assert "expected captions" in run("pretrain.py", *TINY, cwd=copy, fails=True)
    own = ("--companions", "data/train")  # what is read without the flag
    assert "expected captions" in run("pretrain.py", *TINY, *own, cwd=copy, fails=True)
    (copy / "data/train.captions.jsonl").write_text(captions)
    (copy / "data/train.saliency.npy").unlink()
    line = run("pretrain.py", *TINY, cwd=copy, fails=True)
    assert line.endswith("; make it with: python saliency.py --data data/train.csv")
    other = run("pretrain.py", *TINY, "--companions", "other/train", cwd=copy, fails=True)
    assert other.endswith(
        "; make it with: python saliency.py --data data/train.csv --out other/train"
    )
    (copy / "data/train.captions.jsonl").unlink()
    line = run("pretrain.py", *TINY, cwd=copy, fails=True)
    assert line.endswith(
        "; make it with: python caption.py --data data/train.csv "
        "&& python saliency.py --data data/train.csv"
    )
    (copy / "data/train.captions.jsonl").write_text(captions)
    lines = (copy / "data/train.csv").read_text().splitlines()
    (copy / "data/train.csv").write_text("\n".join(lines[:-1]) + "\n")
    assert "is of another manifest" in run(
        "pretrain.py", *TINY, "--mask", "tube", cwd=copy, fails=True
    )


# ---- learning rates


def test_the_rate_and_its_floor_follow_the_videos_not_their_samples(world, tmp_path):
    """VideoMAE's and mae_st's rule: 16 videos a step, whatever --repeat; the floor is 1e-5 at
    256 videos.
    """
    flags = (
        *TINY,
        *"--repeat 4 --accum 2 --epochs 4 --log-every 1".split(),
        "--data",
        world / "data/train.csv",
    )
    out = run("pretrain.py", *flags, "--out", tmp_path)
    assert "64 = 8 videos x 4 repeats x 2 accumulated x 1 ranks" in out
    assert "0.000125 = 0.002 x 16 videos / 256, down to 6.25e-07; 4 epochs, 16 effective" in out
    peak, floor = 2e-3 * 16 / 256, 1e-5 * 16 / 256
    rates = [line["lr"] for line in log(tmp_path)]
    falling = [floor + (peak - floor) * 0.5 * (1 + np.cos(np.pi * step / 6)) for step in range(6)]
    assert rates == pytest.approx([peak / 2, peak, *falling])


# ---- the contrastive loss


def test_the_model_is_told_which_samples_are_of_one_video(world, tmp_path, monkeypatch):
    groups = []
    forward = pretrain.models.info_nce
    monkeypatch.setattr(
        pretrain.models, "info_nce", lambda *args: groups.append(args[3].tolist()) or forward(*args)
    )
    run(
        "pretrain.py",
        *TINY,
        "--repeat",
        3,
        "--max-steps",
        1,
        "--data",
        world / "data/train.csv",
        "--out",
        tmp_path,
    )
    (group,) = groups
    order = np.random.default_rng([0, 0]).permutation(np.arange(32))
    assert group == np.repeat(order[:8], 3).tolist()


def test_the_temperature_of_a_run_stays_below_its_limit_and_moves(world, tmp_path):
    flags = (*TINY, "--data", world / "data/train.csv", "--max-steps", 4)
    run("pretrain.py", *flags, "--out", tmp_path / "a")
    saved = torch.load(tmp_path / "a/checkpoint.pt", weights_only=True)
    saved["model"]["contrastive.logit_scale"].fill_(6.0)
    torch.save(saved, tmp_path / "hot.pt")
    run("pretrain.py", *flags, "--init", tmp_path / "hot.pt", "--out", tmp_path / "b")
    limit = float(np.log(100))
    assert limit - 0.01 < weights(tmp_path / "b")["contrastive.logit_scale"].item() < limit


# ---- going on


@pytest.fixture
def begun(copy):
    """A run of four of twelve steps, in copy/run, and its flags."""
    flags = (*TINY, "--max-steps", 4, "--out", "run")
    run("pretrain.py", *flags, cwd=copy)
    return copy, (*TINY, "--out", "run", "--resume", "auto")


def test_a_run_goes_on_with_its_own_flags_only(begun):
    copy, flags = begun
    before = (copy / "run/checkpoint.pt").read_bytes()
    refused = {
        ("--mask", "tube"): "--mask was text, is tube; --mask-ratio was 0.6, is 0.9",
        ("--nce-weight", 0): "--nce-weight was 1.0, is 0.0",
        ("--batch-size", 4): "batch size x ranks was 8, is 4",
        ("--accum", 2): "--accum was 1, is 2",
        ("--seed", 7): "--seed was 0, is 7",
        ("--weight-decay", 0): "--weight-decay was 0.05, is 0.0",
        ("--blr", 1e-3): "--blr was 0.002, is 0.001",
        ("--epochs", 2): "--epochs was 3, is 2",
        ("--amp", "bf16"): "--amp was off, is bf16",
        ("--stride", 4): "--stride was 2, is 4",
        ("--size", "small"): "--image-size was 48, is 224",
        ("--data", "data/val.csv"): "--data was data/train.csv, is data/val.csv",
        ("--root", "data/"): "--root was None, is data/",
        ("--flip",): "--flip was False, is True",
        ("--init", "run/checkpoint.pt"): "--init was None, is run/checkpoint.pt",
    }
    for changed, expected in refused.items():
        line = run("pretrain.py", *flags, *changed, cwd=copy, fails=True)
        assert line.startswith("run/checkpoint.pt: another run: "), line
        assert expected in line and "write elsewhere (--out)" in line, line
    assert (copy / "run/checkpoint.pt").read_bytes() == before and log(copy / "run")[-1][
        "step"
    ] == 4
    free = (
        "--workers 1 --log-every 1 --save-every 3 --picture-every 1 "
        "--device cpu --checkpointing --video-timeout 50 --max-bad 0.5 "
        "--max-steps 5"
    ).split()
    assert "from step 4" in run("pretrain.py", *flags, *free, cwd=copy)


def test_a_run_goes_on_with_its_own_data_only(begun):
    copy, flags = begun
    text = copy / "data/train.text.json"
    original = text.read_text()
    text.write_text(json.dumps(json.loads(original) | {"clip": "another"}))
    line = run("pretrain.py", *flags, cwd=copy, fails=True)
    assert line.startswith("run/checkpoint.pt: another run: data/train.text.npy was ")
    assert line.endswith(
        ". Give the flags and the data it was begun with, write elsewhere (--out), or begin again "
        "with --resume none"
    )
    text.write_text(original)
    array = np.load(copy / "data/train.saliency.npy", mmap_mode="r+")
    kept = array[3].copy()
    array[3] = np.nan
    array.flush()
    line = run("pretrain.py", *flags, cwd=copy, fails=True)
    assert "another run: usable videos was 32 (" in line and "), is 31 (" in line
    array[3] = kept
    array.flush()
    assert "from step 4" in run("pretrain.py", *flags, cwd=copy)
    run(
        "pretrain.py",
        *TINY,
        *"--mask tube --nce-weight 0 --companions no --out bare --max-steps 1".split(),
        cwd=copy,
    )
    lines = (copy / "data/train.csv").read_text().splitlines()
    (copy / "data/train.csv").write_text(
        "\n".join([lines[0], lines[2], lines[1], *lines[3:]]) + "\n"
    )
    line = run(
        "pretrain.py",
        *TINY,
        *"--mask tube --nce-weight 0 --companions no --out bare --resume auto".split(),
        cwd=copy,
        fails=True,
    )
    assert line.startswith("bare/checkpoint.pt: another run: data/train.csv was ")


def test_the_product_of_ranks_and_batch_counts(copy):
    """A run of one rank with eight videos goes on with two ranks of four, not with one of four."""
    flags = [*TINY, "--max-steps", 2, "--out", "run"]
    run("pretrain.py", *flags, cwd=copy)
    flags += ["--resume", "auto", "--max-steps", 4, "--batch-size"]
    line = run("pretrain.py", *flags, 4, cwd=copy, fails=True)
    assert "batch size x ranks was 8, is 4" in line
    assert "from step 2" in run("pretrain.py", *flags, 4, cwd=copy, ranks=2)
    assert [line["step"] for line in log(copy / "run")] == [2, 4]


def test_more_epochs_follow_the_longer_schedule(begun):
    """From step 8 of 12 on, of 24: the rate is that of the longer cosine, at once."""
    copy, flags = begun
    run("pretrain.py", *flags, "--max-steps", 8, cwd=copy)
    out = run("pretrain.py", *flags, "--epochs", 6, "--log-every", 1, cwd=copy)
    peak, floor = 2e-3 * 8 / 256, 1e-5 * 8 / 256
    rate = lambda step, total: (
        floor + (peak - floor) * 0.5 * (1 + np.cos(np.pi * (step - 4) / (total - 4)))
    )
    assert (
        "begun for 3 epochs, now 6: the learning rate is that of the longer schedule from here on"
        in out
    )
    assert [line["lr"] for line in log(copy / "run") if line["step"] > 8] == pytest.approx(
        [rate(step, 24) for step in range(8, 24)]
    )


def test_resume_none_puts_the_old_checkpoint_aside_at_once(begun, monkeypatch):
    """A kill before the first save must not leave it to --resume auto, which would go on with
    the old run.
    """
    copy, flags = begun
    before = (copy / "run/checkpoint.pt").read_bytes()
    log_before = (copy / "run/log.jsonl").read_text()

    class Killed(BaseException):
        pass

    def kill(*_, **__):
        raise Killed

    monkeypatch.setattr(checkpoints, "save_checkpoint", kill)
    with pytest.raises(Killed):
        run("pretrain.py", *TINY, "--out", "run", "--resume", "none", cwd=copy)
    monkeypatch.undo()
    assert (
        not (copy / "run/checkpoint.pt").exists()
        and (copy / "run/checkpoint.old.pt").read_bytes() == before
        and (copy / "run/log.old.jsonl").read_text() == log_before
    )
    monkeypatch.setattr(checkpoints, "save_checkpoint", kill)
    with pytest.raises(Killed):  # a second time: nothing of a run that never saved is kept
        run("pretrain.py", *TINY, "--out", "run", "--resume", "none", cwd=copy)
    monkeypatch.undo()
    assert (copy / "run/log.old.jsonl").read_text() == log_before
    assert "from step 0" in run("pretrain.py", *flags, "--max-steps", 1, cwd=copy)


def test_a_checkpoint_that_is_not_ours(begun):
    copy, flags = begun
    run(
        "finetune.py",
        *"--size tiny --batch-size 8 --max-steps 1 --views 1 1 --workers 0 --out run2".split(),
        cwd=copy,
    )
    for more in (["--resume", "auto"], []):
        line = run("pretrain.py", *TINY, "--out", "run2", *more, cwd=copy, fails=True)
        assert line == (
            "run2/checkpoint.pt: no checkpoint of pretrain.py: write elsewhere (--out), or begin "
            "again with --resume none"
        )
    (copy / "run/checkpoint.pt").write_bytes(b"x")
    assert "no checkpoint that can be read safely" in run(
        "pretrain.py", *flags, cwd=copy, fails=True
    )


def test_a_log_that_a_full_disk_left_half_written(begun):
    copy, flags = begun
    with open(copy / "run/log.jsonl", "a") as file:
        file.write('{"step": 5, "epoch": 1.2')
    process = [sys.executable, str(ROOT / "pretrain.py"), *map(str, flags), "--max-steps", "6"]
    done = subprocess.run(
        process, cwd=copy, env=ENVIRONMENT, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "broken" in line] == [
        "run/log.jsonl: 1 broken line dropped"
    ]
    assert [line["step"] for line in log(copy / "run")] == [2, 4, 6]


@pytest.mark.parametrize("file", ["log.jsonl", "args.json"])
def test_a_disk_that_is_full_under_the_log_or_the_flags(begun, monkeypatch, file):
    """One line with the reason, and the last checkpoint is kept."""
    copy, flags = begun
    before = {path.name: path.read_bytes() for path in (copy / "run").iterdir()}
    if file == "log.jsonl":  # which is appended to
        (copy / "run/log.jsonl").unlink()
        (copy / "run/log.jsonl").symlink_to("/dev/full")
        monkeypatch.setattr(resume, "keep_log", lambda path, step: None)
        line = run("pretrain.py", *flags, cwd=copy, fails=True)
        assert line == "run/log.jsonl: cannot be written (No space left on device)"
    else:  # which is written aside
        (copy / "run/args.json.new").symlink_to("/dev/full")
        line = run("pretrain.py", *flags, cwd=copy, fails=True)
        assert line == "run/args.json: cannot be written (No space left on device)"
        assert (copy / "run/args.json").read_bytes() == before["args.json"]
    assert (copy / "run/checkpoint.pt").read_bytes() == before["checkpoint.pt"]


# ---- several ranks and nodes


def start(command, cwd, *launcher):
    return subprocess.Popen(
        [sys.executable, *map(str, launcher), str(ROOT / "pretrain.py"), *map(str, command)],
        cwd=cwd,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def two_nodes(commands, folders, restarts=0):
    """Two torchrun agents on this machine, one rank each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = (
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=localhost:{port}",
        f"--max-restarts={restarts}",
    )
    return [
        start(command, folder, *launcher) for command, folder in zip(commands, folders, strict=True)
    ]


def wait_for_step(folder, step, processes):
    until = time.time() + 200
    while (
        not (folder / "log.jsonl").exists()
        or not (lines := log(folder))
        or lines[-1]["step"] < step
    ):
        assert all(process.poll() is None for process in processes) and time.time() < until, [
            process.communicate() for process in processes
        ]
        time.sleep(0.1)


def ranks_of(agent):
    return list(
        map(
            int,
            subprocess.run(
                ["pgrep", "-P", str(agent.pid)], capture_output=True, text=True
            ).stdout.split(),
        )
    )


def test_two_nodes_equal_one_with_two_ranks(copy):
    flags = (*TINY, "--epochs", 1, "--log-every", 1)
    run("pretrain.py", *flags, "--out", "one", cwd=copy, ranks=2)
    nodes = two_nodes([(*flags, "--out", "two")] * 2, [copy] * 2)
    said = outputs(nodes, timeout=200)
    assert [node.returncode for node in nodes] == [0, 0], said
    one, two = weights(copy / "one"), weights(copy / "two")
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert sorted(
        "16 = 8 videos x 1 repeats x 1 accumulated x 2 ranks" in out for out, _ in said
    ) == [False, True]


def test_nodes_may_have_their_data_in_other_places(copy, tmp_path):
    """Also when the run goes on, though the checkpoint holds rank 0's paths."""
    other = tmp_path / "other"
    shutil.copytree(copy / "data", other, symlinks=True)
    flags = (*TINY, "--epochs", 2, "--log-every", 1, "--out", "run", "--resume", "auto")
    commands = [flags, (*flags, "--data", other / "train.csv")]
    for more in (("--max-steps", 1), ()):
        nodes = two_nodes([(*command, *more) for command in commands], [copy] * 2)
        said = outputs(nodes, timeout=200)
        assert [node.returncode for node in nodes] == [0, 0], said
    assert any("from step 1" in out for out, _ in said)


def test_nodes_that_do_not_share_a_folder_are_refused(copy, tmp_path):
    """Rank 0 would go on from step 2, rank 1 begin at 0, and so the other way round; and so
    nodes with other flags.
    """
    flags = (*TINY, "--batch-size", 4, "--log-every", 1, "--out", "run")
    run("pretrain.py", *flags, "--batch-size", 8, "--max-steps", 2, cwd=copy)
    other = tmp_path / "other"
    other.mkdir()
    (other / "data").symlink_to(copy / "data")
    nodes = two_nodes([(*flags, "--resume", "auto")] * 2, [copy, other])
    said = outputs(nodes, timeout=200)
    assert [node.returncode for node in nodes] == [1, 1], said
    lines = [
        line
        for _, errors in said
        for line in errors.splitlines()
        if "all nodes must see the same folder" in line
    ]
    first, second = (2, 0) if "rank 0 would go on from step 2" in lines[0] else (0, 2)
    assert lines == [
        f"--out run: rank 0 would go on from step {first}, rank 1 from step {second}: all nodes must see the same folder"
    ]
    nodes = two_nodes(
        [(*flags, "--resume", "none"), (*flags, "--resume", "none", "--seed", 1)], [other, other]
    )
    said = outputs(nodes, timeout=200)
    lines = [
        line
        for _, errors in said
        for line in errors.splitlines()
        if "start every node alike" in line
    ]
    assert (
        len(lines) == 1
        and lines[0].startswith("seed is ")
        and [node.returncode for node in nodes] == [1, 1]
    )
    assert not (other / "run").exists()


def test_two_nodes_heal_by_one_restart(copy):
    """kill -9 of the second node's rank: both agents start theirs again, once, and the end is
    that of an uninterrupted run.
    """
    flags = (
        *TINY,
        *"--batch-size 4 --epochs 12 --log-every 1 --save-every 3 --resume auto".split(),
    )
    run("pretrain.py", *flags, "--out", "whole", cwd=copy, ranks=2)
    nodes = two_nodes([(*flags, "--out", "run")] * 2, [copy] * 2, restarts=1)
    wait_for_step(copy / "run", 7, nodes)
    os.kill(ranks_of(nodes[1])[0], signal.SIGKILL)
    said = outputs(nodes, timeout=200)
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sum(out.count("48 = 12 epochs x 4, from step") for out, _ in said) == 2
    whole, healed = weights(copy / "whole"), weights(copy / "run")
    assert all(torch.equal(whole[key], healed[key]) for key in whole)


def test_torchrun_does_not_restart_what_a_signal_to_it_ended(copy):
    flags = (*TINY, "--epochs", 1000, "--log-every", 1, "--resume", "auto", "--out", "run")
    agent = start(
        flags,
        copy,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "--max-restarts=2",
    )
    wait_for_step(copy / "run", 3, [agent])
    agent.send_signal(signal.SIGTERM)
    out, errors = agent.communicate(timeout=100)
    assert agent.returncode == 1 and out.count("2000 = 1000 epochs x 2, from step") == 1, errors
    step = torch.load(copy / "run/checkpoint.pt", weights_only=True)["step"]
    assert (
        f"SIGTERM: saved run/checkpoint.pt at step {step}; --resume auto goes on" in out
        and step == log(copy / "run")[-1]["step"]
    )


def test_torchrun_restarts_when_one_rank_alone_is_told_to_stop(copy):
    """All save and end by the signal, a failure to torchrun; the restart goes on where they
    were.
    """
    flags = (*TINY, "--epochs", 12, "--log-every", 1, "--resume", "auto", "--out", "run")
    agent = start(
        flags,
        copy,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "--max-restarts=1",
    )
    wait_for_step(copy / "run", 3, [agent])
    os.kill(ranks_of(agent)[1], signal.SIGTERM)
    out, errors = agent.communicate(timeout=200)
    assert agent.returncode == 0, errors
    saved = int(re.search(r"SIGTERM.*: saved run/checkpoint.pt at step (\d+)", out).group(1))
    assert re.findall(r"24 = 12 epochs x 2, from step (\d+)", out) == ["0", str(saved)]
    assert [line["step"] for line in log(copy / "run")] == list(range(1, 25))


def test_max_bad_counts_the_videos_of_all_ranks(copy):
    """One unreadable video on each of two ranks, one allowed in all."""
    order = np.random.default_rng([0, 0]).permutation(np.arange(32))
    bad = [int(order[0]), int(order[8])]
    lines = (copy / "data/train.csv").read_text().splitlines()
    for row in bad:
        lines[1 + row] = f"bad{row}.mp4" + lines[1 + row][lines[1 + row].index(",") :]
        (copy / f"data/bad{row}.mp4").write_bytes(b"not a video")
    (copy / "data/train.csv").write_text("\n".join(lines) + "\n")
    flags = (*TINY, "--mask", "tube", "--nce-weight", 0, "--companions", "none")
    agent = start(
        (*flags, "--out", "run"),
        copy,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
    )
    _, errors = agent.communicate(timeout=200)
    names = ", ".join(f"bad{row}.mp4" for row in sorted(bad))
    assert (
        agent.returncode == 1
        and errors.count(f"2 of 32 videos cannot be read, more than --max-bad 0.05: {names}\n") == 1
    ), errors
    run("pretrain.py", *flags, "--max-bad", 0.0625, "--out", "more", cwd=copy, ranks=2)
    assert log(copy / "more")[-1]["skipped"] == 2  # each is counted once, whichever ranks met it


def test_a_loss_that_is_not_finite_stops_both_ranks_with_one_line(copy):
    agent = start(
        (*TINY, "--nce-weight", 1e39, "--out", "run"),
        copy,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
    )
    _, errors = agent.communicate(timeout=200)
    (line,) = [line for line in errors.splitlines() if "not finite" in line]
    assert (
        line.startswith("step 1: the loss or its gradient is not finite")
        and line.count(".mp4") == 16
        and agent.returncode == 1
    )


# ---- said before nonsense begins


def test_videos_that_are_gone_are_one_line(copy):
    (copy / "data/videos").unlink()
    line = run("pretrain.py", *TINY, cwd=copy, fails=True)
    assert line == (
        "data/train.csv: 32 of 32 videos that were looked for are not there, such as data/videos/train/00000.mp4: relative paths start "
        "at data (--root names another folder, --max-bad allows more)"
    )


def test_videos_that_are_gone_in_a_pattern_are_found_in_proportion(tmp_path):
    """Of 10,240 rows every 40th is missing, and so is every video of one in 40 rows."""
    videos = [SimpleNamespace(path=__file__) for _ in range(10_240)]
    for row in range(0, 10_240, 40):
        videos[row] = SimpleNamespace(path=str(tmp_path / "gone.mp4"))
    checks.refuse_missing("a.csv", videos, np.arange(10_240), None, 0.05)
    for row in range(0, 10_240, 22):  # 0.0454: some draws have more than 0.05
        videos[row] = SimpleNamespace(path=str(tmp_path / "gone.mp4"))
    draws = [np.random.default_rng(seed).permutation(10_240) for seed in range(40)]
    for rows in draws:
        checks.refuse_missing("a.csv", videos, rows[rows % 40 > 0], None, 0.05)
    with pytest.raises(RunError, match="^a.csv: [12][0-9] of 256 videos that were looked for"):
        checks.refuse_missing("a.csv", videos, np.arange(10_240), None, 0.01)


def test_videos_that_no_worker_can_read_are_one_line(copy):
    line = run("pretrain.py", *TINY, "--video-timeout", 1e-9, "--workers", 1, cwd=copy, fails=True)
    assert "nine videos drawn in its place cannot be read" in line and "Traceback" not in line


@pytest.mark.parametrize(
    "error", [pretrain.VideoError("data/a.mp4: gone"), OSError(28, "No space left on device")]
)
def test_a_picture_that_cannot_be_drawn_ends_nothing(copy, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(pretrain, "draw_reconstruction", fail)
    run("pretrain.py", *TINY, "--picture-every", 1, "--out", "run", cwd=copy)
    assert log(copy / "run")[-1]["step"] == 12


def test_few_videos_get_flags_that_work(copy):
    lines = (copy / "data/train.csv").read_text().splitlines()
    (copy / "data/few.csv").write_text("\n".join(lines[:21]) + "\n")
    few = ("--data", "data/few.csv", "--mask", "tube", "--nce-weight", 0)
    line = run("pretrain.py", *few, cwd=copy, fails=True)
    assert line.startswith(
        "data/few.csv: 20 usable videos do not fill one step of 32 videos x 1 accumulated x 1 ranks: lower --batch-size or --accum; "
    )
    trial = line.split("for a trial: ")[1].split()
    assert trial == "--size tiny --batch-size 4 --accum 1 --epochs 20 --warmup-epochs 2".split()
    assert "steps        100 = 20 epochs x 5" in run(
        "pretrain.py", *few, *trial, "--workers", 0, "--max-steps", 1, cwd=copy
    )


def test_gigabytes_are_refused_before_they_are_taken(copy):
    line = run("pretrain.py", *TINY, "--batch-size", 10**6, "--repeat", 100, cwd=copy, fails=True)
    assert line.startswith(
        "one batch is 5530 GB of pixels (1 ranks x 1000000 videos x 100 repeats x 8 frames of 48 pixels), this machine has "
    )
    line = run(
        "pretrain.py",
        *"--batch-size 1 --frames 1000 --image-size 2048".split(),
        cwd=copy,
        fails=True,
    )
    assert line.startswith(
        "1000 frames of 2048 pixels are 8192000 tokens, more than this machine's "
    )


def test_without_captions_the_flag_that_needs_none_is_named(copy):
    (copy / "data/train.text.npy").unlink()
    line = run("pretrain.py", *TINY, "--mask", "tube", cwd=copy, fails=True)
    assert line.endswith(
        "; make it with: python saliency.py --data data/train.csv; "
        "or train without captions: --nce-weight 0"
    )
    assert "--nce-weight" not in run("pretrain.py", *TINY, "--mask", "text", cwd=copy, fails=True)


def test_what_is_left_out_and_what_is_half_made_is_said(copy):
    array = np.load(copy / "data/train.saliency.npy", mmap_mode="r+")
    array[[3, 9, 11]] = np.nan
    array.flush()
    out = run("pretrain.py", *TINY, "--warmup-epochs", 40, "--max-steps", 1, cwd=copy)
    assert (
        "29 of 32 videos usable" in out
        and "each epoch leaves out 5 videos, others each time" in out
    )
    assert (
        "the saliency array: 29 of 32 rows are made; the rest failed or are still to do, and are "
        "left out" in out
    )
    assert "the warm-up of 40 epochs lasts the whole run" in out and "the text array" not in out
    array[:] = np.nan
    array.flush()
    assert run("pretrain.py", *TINY, "--out", "x", cwd=copy, fails=True) == (
        "data/train.csv: none of the 32 videos has a row in data/train.text.npy and "
        "data/train.saliency.npy; what caption.py or saliency.py printed says why"
    )


def test_a_large_model_on_a_cpu_is_told_what_it_takes(world, tmp_path):
    flags = (*TINY, "--data", world / "data/train.csv", "--max-steps", 1)
    out = run(
        "pretrain.py",
        *flags,
        *"--size small --frames 2 --image-size 32".split(),
        "--out",
        tmp_path / "small",
    )
    assert re.search(
        r"--size small on a CPU: about [0-9.e+-]+ s per step, [0-9.e+-]+ hours in all; it wants a GPU; --size tiny is for CPUs",
        out,
    )
    assert "on a CPU" not in run("pretrain.py", *flags, "--out", tmp_path / "tiny")


@pytest.mark.parametrize(
    "flags",
    [
        ("--decoder-keep", "0"),
        ("--mask-ratio", "0"),
        ("--mask-ratio", "nan"),
        ("--clip-grad", "-1"),
        ("--nce-weight", "-1"),
        ("--weight-decay", "-1"),
        ("--stride", "-1"),
        ("--max-steps", "0"),
        ("--blr", "0"),
        ("--device", "mps"),
        ("--warmup-epochs", "-1"),
        ("--epochs", "0"),
        ("--repeat", "0"),
        ("--max-bad", "2"),
        ("--seed", "-1"),
        ("--frames", "0"),
    ],
    ids=" ".join,
)
def test_numbers_out_of_range_name_their_flag(copy, flags):
    line = run("pretrain.py", *TINY, "--max-steps", 1, *flags, cwd=copy, fails=True)
    assert f"argument {flags[0]}: expected " in line
