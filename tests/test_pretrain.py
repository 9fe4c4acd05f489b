"""Stage 3: schedules and samples by value, then the command line: ranks, workers, resuming, every choice, every refusal."""
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, run

import masking
import pretrain

TINY = ("--size", "tiny", "--batch-size", 8, "--epochs", 3, "--warmup-epochs", 1, "--blr", 2e-3, "--log-every", 2,
        "--workers", 0, "--picture-every", 0)


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_learning_rate():
    rate = lambda step: pretrain.learning_rate(step, 1.0, warmup=10, total=110, floor=0.0)
    assert rate(0) == 0.1 and rate(9) == 1.0 and rate(10) == 1.0
    assert rate(60) == pytest.approx(0.5) and rate(109) == pytest.approx(0.5 * (1 + np.cos(np.pi * 0.99)))
    assert pretrain.learning_rate(110, 1.0, 10, 110, floor=0.2) == pytest.approx(0.2)
    assert pretrain.learning_rate(0, 1.0, 0, 10) == 1.0


def test_ranks_side_by_side_are_the_global_batch():
    rows = np.arange(100, 137)
    one = list(pretrain.EpochBatches(rows, 12, 3, seed=4, rank=0, ranks=1))
    two = [list(pretrain.EpochBatches(rows, 6, 3, seed=4, rank=rank, ranks=2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*two)] == one
    drawn = [row for batch in one for _, row in batch]
    assert len(set(drawn)) == 36 and set(drawn) <= set(rows)
    batches = pretrain.EpochBatches(rows, 12, 3, seed=4, rank=0, ranks=1)
    batches.start = 1
    assert list(batches) == one[1:] and len(batches) == 2
    batches.epoch, batches.start = 1, 0
    assert list(batches) != one and all(epoch == 1 for batch in batches for epoch, _ in batch)


def test_multi_scale_crop():
    torch.manual_seed(0)
    crops = [pretrain.multi_scale_crop(100, 200) for _ in range(2000)]
    assert all(0 <= top <= 100 - h and 0 <= left <= 200 - w for top, left, h, w in crops)
    sides = {(h, w) for _, _, h, w in crops}
    assert sides == {(a, b) for a in (100, 87, 75, 66) for b in (100, 87, 75, 66)
                     if abs((100, 87, 75, 66).index(a) - (100, 87, 75, 66).index(b)) <= 1}
    assert {left for _, left, h, w in crops if (h, w) == (100, 100)} == {0, 25, 50, 75, 100}


def clips(world, **flags):
    args = pretrain.parse_args(["--data", str(world / "data/train.csv"), "--size", "tiny", "--stride", "2"])
    vars(args).update({"frames": 8, "image_size": 64} | flags)
    videos, rows, arrays = pretrain.open_data(args)
    return pretrain.Clips(videos, rows, args, (4, 4, 4), **arrays)


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
    assert torch.equal(clips(world, repeat=1, flip=True)[2, 7]["clip"][0], first["clip"][0])  # repeats only add


def test_a_sample_brings_the_caption_it_was_given(world):
    data = clips(world, repeat=8)
    sample = data[0, 5]
    for text, maps in zip(sample["text"], sample["saliency"]):
        k = [np.array_equal(maps, data.saliency[5, k]) and np.array_equal(text, data.text[5, k].astype(np.float32)) for k in range(3)]
        assert any(k)


def test_the_mission_command_with_two_ranks(copy):
    """`torchrun --nproc_per_node=2 pretrain.py --mask text`, data at its default place: learns, logs, saves, draws."""
    out = run("pretrain.py", "--mask", "text", "--size", "tiny", "--batch-size", 8, "--epochs", 4, "--workers", 1, "--log-every", 1,
              "--picture-every", 2, "--blr", 0.02, "--warmup-epochs", 1, cwd=copy, ranks=2)
    assert "28 of 64 visible: mask text at 0.6" in out and "16 = 8 videos x 1 repeats x 1 accumulated x 2 ranks" in out
    lines = log(copy / "runs/text")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert set(lines[0]) == {"step", "epoch", "loss_mae", "loss_nce", "lr", "grad_norm", "data_ms", "step_ms", "clips_per_s", "left_s", "skipped"}
    assert lines[-1]["loss_mae"] < lines[0]["loss_mae"] - 0.02
    assert 0.9 < lines[0]["loss_mae"] < 1.5 and 2 < lines[0]["loss_nce"] < 4  # trivial: about 1; chance: ln 16
    assert (copy / "runs/text/reconstruction_000004.png").stat().st_size > 1000
    args = json.loads((copy / "runs/text/args.json").read_text())
    assert (args["mask"], args["frames"], args["stride"], args["image_size"]) == ("text", 8, 2, 32)


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
        assert a["loss_mae"] == pytest.approx(b["loss_mae"], rel=1e-5) and a["loss_nce"] == pytest.approx(b["loss_nce"], rel=1e-5)


def test_accumulation_equals_one_large_batch(copy):
    flags = [*TINY, "--max-steps", 2, "--nce-weight", 0]  # the contrastive loss knows only the batch it sees
    run("pretrain.py", *flags, "--accum", 2, "--out", "two", cwd=copy)
    flags[flags.index("--batch-size") + 1] = 16
    run("pretrain.py", *flags, "--out", "one", cwd=copy)
    one, two = weights(copy / "one"), weights(copy / "two")
    assert all(torch.allclose(one[key], two[key], rtol=1e-3, atol=2e-5) for key in one if not key.startswith("contrastive"))


def test_resuming_and_workers_change_nothing(copy):
    run("pretrain.py", *TINY, "--repeat", 2, "--flip", "--out", "whole", cwd=copy)
    run("pretrain.py", *TINY, "--repeat", 2, "--flip", "--out", "parts", "--max-steps", 6, "--resume", "auto", cwd=copy)
    (copy / "parts/log.jsonl").open("a").write('{"step": 7}\n')  # logged after the last checkpoint, lost in a kill
    flags = [*TINY, "--repeat", 2, "--flip", "--out", "parts", "--resume", "auto"]
    flags[flags.index("--workers") + 1] = 4
    assert "from step 6" in run("pretrain.py", *flags, cwd=copy)
    whole, parts = weights(copy / "whole"), weights(copy / "parts")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert [line["step"] for line in log(copy / "parts")] == [line["step"] for line in log(copy / "whole")] == [2, 4, 6, 8, 10, 12]
    assert [line["loss_mae"] for line in log(copy / "parts")] == [line["loss_mae"] for line in log(copy / "whole")]
    assert "already at step 12" in run("pretrain.py", *flags, cwd=copy)
    assert "--resume auto goes on from it" in run("pretrain.py", *TINY, "--out", "whole", cwd=copy, fails=True)


@pytest.mark.parametrize("mask", ["text", "tube", "random"])
def test_decoding_half_of_the_masked_tokens(copy, monkeypatch, mask):
    """Half the masked tokens of every sample reach the decoder; resuming changes nothing; --decoder-keep 1 is the default."""
    counts, decode = [], pretrain.models.VideoMAE.decode
    monkeypatch.setattr(pretrain.models.VideoMAE, "decode", lambda self, tokens, seen, hidden: counts.append(
        (seen.shape[1], hidden.shape[1])) or decode(self, tokens, seen, hidden))
    flags = (*TINY, "--mask", mask, "--mask-ratio", 0.6, "--epochs", 2)
    half = (*flags, "--decoder-keep", 0.5)
    assert "28 of 64 visible" in (out := run("pretrain.py", *half, "--out", "whole", cwd=copy)) and "; 18 reconstructed" in out
    assert set(counts) == {(28, 18)}
    run("pretrain.py", *half, "--out", "parts", "--max-steps", 3, cwd=copy)
    run("pretrain.py", *half, "--out", "parts", "--resume", "auto", cwd=copy)
    whole, parts = weights(copy / "whole"), weights(copy / "parts")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    run("pretrain.py", *flags, "--out", "default", cwd=copy)
    assert counts[-1] == (28, 36)
    run("pretrain.py", *flags, "--decoder-keep", 1, "--out", "one", cwd=copy)
    default, one = weights(copy / "default"), weights(copy / "one")
    assert all(torch.equal(default[key], one[key]) for key in one) and not torch.equal(one["mask_token"], whole["mask_token"])


def test_weight_zero_monitors_and_leaves_the_encoder_alone(copy):
    """With --nce-weight 0 everything but the head is as if there were no captions, gradient clipping included."""
    flags = (*TINY, "--mask", "tube", "--nce-weight", 0, "--clip-grad", 0.5, "--max-steps", 4)
    run("pretrain.py", *flags, "--out", "monitored", cwd=copy)
    (copy / "data/train.text.npy").unlink()
    assert "no text array" in run("pretrain.py", *flags, "--out", "alone", cwd=copy)
    monitored, alone = weights(copy / "monitored"), weights(copy / "alone")
    assert all(torch.equal(monitored[key], alone[key]) for key in alone if not key.startswith("contrastive."))
    assert log(copy / "monitored")[0]["loss_nce"] > 1 and log(copy / "alone")[0]["loss_nce"] is None


@pytest.mark.parametrize("flags", [
    *[("--mask", mask, "--crop", crop) for mask, crop in zip(masking.MASKS, ["multiscale", "resized"] * 3, strict=True)],
    *[("--mask", mask, "--nce-weight", 0, "--repeat", 2, "--flip") for mask in masking.MASKS],
    ("--mask", "random", "--mask-ratio", 0.75, "--crop-scale", 0.2, 0.9), ("--amp", "bf16"), ("--amp", "fp16"), ("--amp", "off"),
    ("--checkpointing",), ("--frames", 4, "--image-size", 96, "--no-flip"), ("--clip-grad", 0, "--device", "cpu"),
], ids=str)
def test_every_choice_trains(world, tmp_path, flags):
    run("pretrain.py", *TINY, "--data", world / "data/train.csv", "--out", tmp_path, *flags, "--max-steps", 2)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
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
        run("pretrain.py", *TINY, "--size", size, "--frames", 2, "--image-size", 64, "--batch-size", 2, "--max-steps", 1,
            "--data", world / "data/train.csv", "--out", tmp_path / size)
    with torch.device("meta"):
        for size in ("large", "huge"):
            pretrain.models.VideoMAE(size)


def test_init_starts_from_a_checkpoint(world, tmp_path):
    flags = (*TINY, "--data", world / "data/train.csv", "--max-steps", 2)
    run("pretrain.py", *flags, "--out", tmp_path / "a")
    start = run("pretrain.py", *flags, "--out", tmp_path / "b", "--init", tmp_path / "a/checkpoint.pt")
    assert "every key" in start and log(tmp_path / "b")[0]["loss_mae"] < log(tmp_path / "a")[0]["loss_mae"]
    line = run("pretrain.py", *flags, "--out", tmp_path / "c", "--size", "small", "--image-size", 32, "--init", tmp_path / "a/checkpoint.pt", fails=True)
    assert "encoder.patch_embed.proj.weight" in line and "[96, 3, 2, 8, 8]" in line


@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_saves_and_exits_0(world, tmp_path, workers):
    """As a scheduler sends it: to the whole process group, the loader's workers included."""
    command = ["pretrain.py", *TINY, "--epochs", 1000, "--workers", workers, "--data", world / "data/train.csv", "--out", tmp_path]
    process = subprocess.Popen([sys.executable, str(ROOT / command[0]), *map(str, command[1:])], env=ENVIRONMENT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    while not process.stdout.readline().startswith("step "):
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "SIGTERM: saved" in out, errors
    step = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
    assert step == log(tmp_path)[-1]["step"] < 4000


def test_bad_videos_give_their_place_to_others(copy):
    (copy / "data/bad.mp4").write_bytes(b"not a video")
    lines = (copy / "data/train.csv").read_text().splitlines()
    lines[4] = "bad.mp4" + lines[4][lines[4].index(","):]
    (copy / "data/train.csv").write_text("\n".join(lines) + "\n")
    flags = (*TINY, "--mask", "tube", "--nce-weight", 0, "--companions", "none")
    assert "32 of 32 videos usable" in run("pretrain.py", *flags, "--out", "a", cwd=copy)
    assert log(copy / "a")[-1]["skipped"] == 1
    assert "more than --max-bad 0.01: bad.mp4" in run("pretrain.py", *flags, "--out", "b", "--max-bad", 0.01, cwd=copy, fails=True)


def test_rows_without_saliency_are_left_out(copy):
    array = np.load(copy / "data/train.saliency.npy", mmap_mode="r+")
    array[[3, 9]] = np.nan
    array.flush()
    assert "30 of 32 videos usable" in run("pretrain.py", *TINY, "--max-steps", 1, cwd=copy)


def test_a_loss_that_is_not_finite_stops_with_names(copy):
    array = np.load(copy / "data/train.text.npy", mmap_mode="r+")
    array[:, :, 5] = np.inf
    array.flush()
    line = run("pretrain.py", *TINY, cwd=copy, fails=True)
    assert "step 1: the loss or its gradient is not finite" in line and "videos/train/000" in line
    assert not (copy / "runs/text/checkpoint.pt").exists()


def test_refusals_name_the_command_that_mends(copy):
    assert "python data/toy.py" in run("pretrain.py", cwd=copy / "data", fails=True, process=True)
    assert "lower --batch-size" in run("pretrain.py", *TINY, "--batch-size", 33, cwd=copy, fails=True)
    assert "multiples" in run("pretrain.py", *TINY, "--frames", 5, cwd=copy, fails=True)
    assert "nowhere.pt: no checkpoint there" in run("pretrain.py", *TINY, "--init", "nowhere.pt", cwd=copy, fails=True)
    if not torch.cuda.is_available():
        assert "no GPU" in run("pretrain.py", *TINY, "--device", "cuda", cwd=copy, fails=True)
    for keep in (0, 1.1):
        assert "--decoder-keep" in run("pretrain.py", *TINY, "--decoder-keep", keep, cwd=copy, fails=True)
    assert "mask ratio 0.01" in run("pretrain.py", *TINY, "--mask-ratio", 0.01, cwd=copy, fails=True)
    captions = (copy / "data/train.captions.jsonl").read_text()
    (copy / "data/train.captions.jsonl").write_text(captions.replace("red", "blue"))
    assert "expected captions" in run("pretrain.py", *TINY, cwd=copy, fails=True)
    (copy / "data/train.captions.jsonl").write_text(captions)
    (copy / "data/train.saliency.npy").unlink()
    line = run("pretrain.py", *TINY, cwd=copy, fails=True)
    assert line.endswith("make it with: python caption.py data/train.csv && python saliency.py data/train.csv")
    lines = (copy / "data/train.csv").read_text().splitlines()
    (copy / "data/train.csv").write_text("\n".join(lines[:-1]) + "\n")
    assert "is of another manifest" in run("pretrain.py", *TINY, "--mask", "tube", cwd=copy, fails=True)
