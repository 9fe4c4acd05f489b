"""Stage 4: layer-wise decay, mixing, views and metrics against written-out references; then the
command line.
"""

import contextlib
import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ENVIRONMENT, ROOT, run
from PIL import Image
from torchvision.transforms import v2

import finetune
import model as models
from tgm import checkpoints, evaluation, resume
from tgm.manifest import read_manifest
from tgm.run import RunError
from tgm.sampling import Views
from tgm.training import Machine

ON_THE_CPU = {"device": torch.device("cpu"), "autocast": contextlib.nullcontext()}
TINY = (
    "--size tiny --batch-size 8 --epochs 3 --warmup-epochs 1 "
    "--log-every 2 --workers 0 --no-flip --views 2 1 --drop-path 0.2"
).split()


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_layer_wise_decay():
    model = models.VideoViT("tiny", classes=5)  # three blocks
    optimizer = finetune.make_optimizer(model, 1.0, 0.5, 0.05)
    found = {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    expected = {
        "patch_embed": 1 / 16,
        "blocks.0": 1 / 8,
        "blocks.1": 1 / 4,
        "blocks.2": 1 / 2,
        "fc_norm": 1,
        "head": 1,
    }
    assert len(found) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        rate = next(rate for start, rate in expected.items() if name.startswith(start))
        still = name.endswith("bias") or "norm" in name
        assert found[id(parameter)] == (rate, 0.0 if still else 0.05), name
    for group in optimizer.param_groups:
        group["lr"] = 1e-9  # as in a run that is resumed near its end
    lines = finetune.layer_table(optimizer, 3, 1.0).splitlines()
    assert [line.split("lr")[0].strip() for line in lines] == [
        "patch embedding",
        "block 0",
        "block 1",
        "block 2",
        "norm and head",
    ]
    assert "0.25" in lines[2]


def test_learning_rate_is_that_of_pretraining():
    import pretrain

    for step in (0, 3, 10, 50, 99):
        for warmup in (10, 3.5):
            rate = finetune.learning_rate(step, 0.1, warmup, 100, 1e-5)
            assert rate == pretrain.learning_rate(step, 0.1, warmup, 100, 1e-5) <= 0.1


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0), (0, 1.0), (0, 0), (0.8, 1.0)])
def test_mixing_and_its_targets(mixup, cutmix):
    """Mixup: x_i and the sample before it, by the share that the target says; cutmix: one box of
    it, of just that share.
    """
    torch.manual_seed(0)
    clips, labels = torch.rand(4, 3, 2, 16, 16), torch.tensor([0, 1, 2, 3])
    mix, kinds = finetune.make_mix(mixup, cutmix, 5), set()
    for _ in range(12):
        mixed, targets = mix(clips.clone(), labels)
        assert (
            mixed.shape == clips.shape
            and targets.shape == (4, 5)
            and torch.allclose(targets.sum(1), torch.ones(4))
        )
        share = targets[0, 0].item()
        assert torch.allclose(
            targets,
            share * F.one_hot(labels, 5) + (1 - share) * F.one_hot(labels.roll(1), 5),
            atol=1e-6,
        )
        before = clips.roll(1, 0)
        if torch.allclose(mixed, share * clips + (1 - share) * before, atol=1e-5):
            kinds.add("mixup" if share < 1 else "none")
        else:
            taken = (mixed == before).all((0, 1, 2))  # [H, W], the same for all frames
            assert torch.equal(
                mixed, torch.where(taken, before, clips)
            ) and taken.float().mean().item() == pytest.approx(1 - share)
            kinds.add("cutmix")
    kinds.discard("none")
    assert kinds == {name for name, alpha in (("mixup", mixup), ("cutmix", cutmix)) if alpha}


def clips_of(world, *flags):
    args = finetune.parse_args(["--data", str(world / "data/train.csv"), *map(str, flags)])
    vars(args).update(frames=8, image_size=48, stride=2)
    videos = read_manifest(args.data)
    return finetune.make_clips(videos, torch.arange(len(videos)), args)


def test_a_sample_is_a_function_of_seed_epoch_row_and_repeat(world):
    data, again = clips_of(world, "--repeat", 3), clips_of(world, "--repeat", 3)
    first = data[2, 7]
    data[1, 3]
    torch.manual_seed(99)
    assert torch.equal(again[2, 7]["clip"], first["clip"]) and first["label"].tolist() == [7] * 3
    assert first["clip"].shape == (3, 3, 8, 48, 48) and first["clip"].dtype == torch.uint8
    assert not torch.equal(first["clip"][0], first["clip"][1]) and not torch.equal(
        data[1, 7]["clip"], first["clip"]
    )


def test_every_frame_is_augmented_alike(world):
    """Eight copies of one frame stay eight copies of one frame, whatever is done to them."""
    data = clips_of(world, "--erase", 1)
    frames = torch.randint(
        0, 256, (1, 3, 72, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    ).expand(8, -1, -1, -1)
    seen = []
    for seed in range(20):
        clip = data.augment(frames, seed)
        assert torch.equal(clip, clip[:, :1].expand_as(clip))
        seen.append(clip[:, 0])
    assert len(torch.stack(seen).unique(dim=0)) == 20
    plain = clips_of(world, "--erase", 0, "--rand-augment", 0, 0, "--crop-scale", 1, 1, "--no-flip")
    square = frames[..., :72]
    expected = F.interpolate(square.float(), (48, 48), mode="bilinear", antialias=True).transpose(
        0, 1
    )
    assert (
        plain.augment(square, 3) - expected
    ).abs().max() < 1.5  # torch's own uint8 arithmetic is within one of the float's


def test_clip_settings_left_open_are_the_checkpoints(tmp_path):
    """A fine-tuned checkpoint's, where flags are not given; --sampling of any other is dense."""
    machine = Machine("cpu", "off")
    saved = {"size": "tiny", "frames": 4, "image_size": 32, "stride": 3}
    weights = finetune.models.VideoViT("tiny", 8, 4, 32).state_dict()

    def settings(saved, *more):
        torch.save({"model": weights, "args": saved}, tmp_path / "c.pt")
        args = finetune.parse_args(["--checkpoint", str(tmp_path / "c.pt"), *more])
        args.classes = list("abcdefgh")
        finetune.make_model(args, machine)
        return args.size, args.frames, args.image_size, args.stride, args.sampling

    assert settings(saved) == ("tiny", 4, 32, 3, "dense")
    assert settings(saved | {"sampling": "uniform"}) == ("tiny", 4, 32, 3, "uniform")
    flags = ("--sampling", "dense", "--stride", "1")
    assert settings(saved | {"sampling": "uniform"}, *flags) == ("tiny", 4, 32, 1, "dense")


def test_uniform_sampling_spreads_over_the_video(world, monkeypatch):
    wanted = []
    monkeypatch.setattr(
        finetune.VideoReader,
        "read",
        lambda self, times: wanted.append(times) or np.zeros((8, 64, 64, 3), np.uint8),
    )
    clips_of(world, "--sampling", "uniform")[0, 0]
    clips_of(world)[0, 0]
    uniform, dense = wanted
    assert (np.floor(uniform / 0.25) == np.arange(8)).all() and np.allclose(np.diff(dense), 0.2)


# ---- testing


def test_prediction_is_the_mean_softmax_over_views_and_bad_videos_are_wrong(world):
    torch.manual_seed(0)
    model = models.VideoViT("tiny", classes=4)
    model.head.weight.data.normal_()
    videos = read_manifest(world / "data/val.csv")[:5]
    videos[3] = videos[3]._replace(path="gone.mp4")
    views = Views(videos, frames=8, image_size=48, stride=2, clips=2, crops=3)
    found = evaluation.predict(model, views, classes=4, **ON_THE_CPU)
    assert model.training and found.shape == (5, 4) and found[3].isnan().all()
    model.eval()
    with torch.no_grad():
        for row in (0, 1, 2, 4):
            by_view = [model(models.normalize(view[None])).softmax(-1)[0] for view in views[row][1]]
            assert torch.allclose(found[row], sum(by_view) / 6, atol=1e-5) and len(by_view) == 6


def test_the_model_never_gets_more_views_at_once_than_a_batch(world):
    model = models.VideoViT("tiny", classes=4)
    videos = read_manifest(world / "data/val.csv")[:3]
    views = Views(videos, frames=8, image_size=48, stride=2, clips=2, crops=3)
    whole = evaluation.predict(model, views, classes=4, batch_size=18, **ON_THE_CPU)
    sizes = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    found = evaluation.predict(model, views, classes=4, batch_size=4, **ON_THE_CPU)
    assert sizes == [4, 2] * 3 and torch.allclose(found, whole, atol=1e-5)


def test_a_model_that_diverged_is_not_taken_for_broken_videos(world):
    model = models.VideoViT("tiny", classes=4)
    model.head.weight.data.fill_(math.nan)
    videos = read_manifest(world / "data/val.csv")[:2]
    views = Views(videos, frames=8, image_size=48, stride=2, clips=1, crops=1)
    with pytest.raises(RunError, match="^the model's outputs are not finite: its training dive"):
        evaluation.predict(model, views, classes=4, **ON_THE_CPU)


def test_scores_against_loops():
    generator = torch.Generator().manual_seed(0)
    # class 6 is absent
    probabilities = torch.rand(200, 7, generator=generator)
    labels = torch.randint(-1, 6, (200,), generator=generator)
    probabilities[5] = probabilities[11] = math.nan
    result = evaluation.score(probabilities, labels, 7)
    top1 = top5 = 0
    right, total, confusion = [0] * 7, [0] * 7, np.zeros((7, 7), int)
    for row, label in zip(probabilities.tolist(), labels.tolist()):
        order = sorted(range(7), key=lambda c: -row[c]) if row[0] == row[0] else []
        total[label] += label >= 0
        if order and label >= 0:
            confusion[label, order[0]] += 1
            top1 += order[0] == label
            right[label] += order[0] == label
            top5 += label in order[:5]
    assert result["top1"] == pytest.approx(top1 / 200) and result["top5"] == pytest.approx(
        top5 / 200
    )
    assert (
        result["mean_class"] == pytest.approx(np.mean([right[c] / total[c] for c in range(6)]))
        and result["per_class"][6].isnan()
    )
    assert np.array_equal(result["confusion"], confusion)


def test_bootstrap_interval():
    correct = torch.arange(400) < 300
    low, high = evaluation.bootstrap(correct)
    spread = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - spread, abs=0.01) and high == pytest.approx(
        0.75 + spread, abs=0.01
    )
    assert evaluation.bootstrap(torch.ones(9, dtype=torch.bool)) == [1.0, 1.0]


@pytest.mark.parametrize("classes", [2, 9, 60, 700])
def test_confusion_picture(tmp_path, classes):
    confusion = torch.eye(classes, dtype=torch.long) * 5
    confusion[0] = 0
    confusion[0, 1] = 3
    evaluation.draw_confusion(
        tmp_path / "c.png", confusion, [f"a class of the name {c}" for c in range(classes)]
    )
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.size[0] == picture.size[1] <= 1620
        cell = max(2, min(36, 1200 // classes))
        margin = picture.size[0] - 4 - cell * classes
        at = lambda i, j: picture.getpixel(
            (margin + j * cell + cell - 2, margin + i * cell + 1 + (cell > 3))
        )
        assert at(0, 1) == at(1, 1) == (20, 60, 130) and at(0, 0) == (255, 255, 255)


# ---- the command line


def test_from_a_pretrained_encoder_to_a_test(world, tmp_path):
    """Trains, validates, tests, writes its files; best and last; then --test-only gives the same
    numbers.
    """
    run(
        "pretrain.py",
        "--data",
        world / "data/train.csv",
        *"--size tiny --batch-size 8 --epochs 1 --workers 0".split(),
        "--out",
        tmp_path / "pre",
        "--mask",
        "tube",
    )
    data = ("--data", world / "data/train.csv", "--val", world / "data/val.csv")
    out = run(
        "finetune.py",
        *TINY,
        *data,
        "--checkpoint",
        tmp_path / "pre/checkpoint.pt",
        "--out",
        tmp_path / "ft",
        "--use",
        "best",
    )
    assert (
        "encoder loaded; not used: " in out
        and "new: final norm (2 keys), classifier (2 keys)" in out
        and "block 2" in out
        and "24 videos, 0 unreadable, 2 x 1 views" in out
    )
    lines = log(tmp_path / "ft")
    assert [line["step"] for line in lines if "val_top1" in line] == [4, 8, 12]
    best = torch.load(tmp_path / "ft/best.pt", weights_only=True)
    # of equals, the first
    first = max((line for line in lines if "val_top1" in line), key=lambda line: line["val_top1"])
    assert best["best"] == first["val_top1"] and best["step"] == first["step"]
    groups = torch.load(tmp_path / "ft/checkpoint.pt", weights_only=True)["optimizer"][
        "param_groups"
    ]
    assert (
        len({group["scale"] for group in groups}) == 5
        and np.ptp([group["lr"] / group["scale"] for group in groups]) < 1e-12
    )
    summary = json.loads((tmp_path / "ft/test.json").read_text())
    labels = [
        [video.label for video in read_manifest(world / f"data/{split}.csv")]
        for split in ("train", "val")
    ]
    seen = [labels[0].count(label) for label in labels[0]]
    common = {label for label, count in zip(labels[0], seen) if count == max(seen)}
    shares = [np.mean([label == usual for label in labels[1]]) for usual in common]
    assert min(abs(summary["majority"] - share) for share in shares) < 1e-6
    assert (
        summary["videos"] == 24
        and summary["checkpoint"].endswith("best.pt")
        and summary["top1_bootstrap"][0] <= summary["top1"]
    )
    with open(tmp_path / "ft/per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == sorted(
        {video.label for video in read_manifest(world / "data/train.csv")}
    )
    assert sum(int(row["videos"]) for row in rows) == 24
    shares = [float(row["accuracy"]) for row in rows if row["accuracy"]]
    assert np.mean(shares) == pytest.approx(summary["mean_class"], abs=1e-4)
    assert (tmp_path / "ft/confusion.png").stat().st_size > 500
    run(
        "finetune.py",
        "--test-only",
        "--checkpoint",
        tmp_path / "ft/best.pt",
        "--test",
        world / "data/val.csv",
        *"--views 2 1 --workers 1".split(),
    )
    again = json.loads((tmp_path / "ft/test/test.json").read_text())  # beside the checkpoint
    assert {key: again[key] for key in ("top1", "top5", "mean_class", "top1_bootstrap")} == {
        key: summary[key] for key in ("top1", "top5", "mean_class", "top1_bootstrap")
    }


def test_two_ranks_test_as_one_does(copy):
    """23 test videos, which two ranks cannot share evenly: the same accuracy, each video once."""
    lines = (copy / "data/val.csv").read_text().splitlines()
    (copy / "data/odd.csv").write_text("\n".join(lines[:-1]) + "\n")
    run("finetune.py", *TINY, "--max-steps", 6, "--out", "one", cwd=copy)
    flags = (
        "--test-only --checkpoint one/checkpoint.pt --test data/odd.csv "
        "--views 2 3 --workers 0 --batch-size 12"
    ).split()
    run("finetune.py", *flags, "--out", "alone", cwd=copy)
    run("finetune.py", *flags, "--out", "both", cwd=copy, ranks=2)
    alone, both = (
        json.loads((copy / name / "test.json").read_text()) for name in ("alone", "both")
    )
    assert alone == both and alone["videos"] == 23
    assert (copy / "alone/per_class.csv").read_text() == (copy / "both/per_class.csv").read_text()


def test_two_ranks_train_as_one_does(copy):
    # which know one rank's batch
    flags = [
        *TINY,
        *"--max-steps 3 --mixup 0 --cutmix 0 --drop-path 0 --views 1 1".split(),
    ]
    flags[flags.index("--batch-size") + 1] = 16
    run("finetune.py", *flags, "--out", "one", cwd=copy)
    flags[flags.index("--batch-size") + 1] = 8
    run("finetune.py", *flags, "--out", "two", cwd=copy, ranks=2)
    one, two = weights(copy / "one/checkpoint.pt"), weights(copy / "two/checkpoint.pt")
    assert all(torch.allclose(one[key], two[key], atol=2e-5) for key in one)


def test_accumulation_is_a_larger_batch(world, tmp_path):
    flags = [
        *TINY,
        "--data",
        world / "data/train.csv",
        "--val",
        world / "data/val.csv",
        *"--max-steps 2 --mixup 0 --cutmix 0 --drop-path 0 --views 1 1".split(),
    ]
    run("finetune.py", *flags, "--accum", 2, "--out", tmp_path / "accum")
    flags[flags.index("--batch-size") + 1] = 16
    run("finetune.py", *flags, "--out", tmp_path / "large")
    accum = weights(tmp_path / "accum/checkpoint.pt")
    large = weights(tmp_path / "large/checkpoint.pt")
    assert all(torch.allclose(accum[key], large[key], atol=2e-5) for key in accum)


def test_resumed_it_is_the_uninterrupted_run(world, tmp_path):
    """Stopped within an epoch by SIGTERM's path and after one by --max-steps; drop path, mixup
    and augmentation on.
    """
    flags = (*TINY, "--data", world / "data/train.csv", "--val", world / "data/val.csv")
    run("finetune.py", *flags, "--out", tmp_path / "whole")
    run("finetune.py", *flags, "--out", tmp_path / "parts", "--max-steps", 3)
    assert "is there already: --resume auto" in run(
        "finetune.py", *flags, "--out", tmp_path / "parts", fails=True
    )
    run(
        "finetune.py",
        *flags,
        "--out",
        tmp_path / "parts",
        *"--max-steps 8 --resume auto --workers 4".split(),
    )
    run("finetune.py", *flags, "--out", tmp_path / "parts", "--resume", "auto")
    whole = weights(tmp_path / "whole/checkpoint.pt")
    parts = weights(tmp_path / "parts/checkpoint.pt")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert (
        json.loads((tmp_path / "whole/test.json").read_text())["top1"]
        == json.loads((tmp_path / "parts/test.json").read_text())["top1"]
    )
    steps = [line["step"] for line in log(tmp_path / "parts") if "loss" in line]
    assert steps == sorted(set(steps)) and steps[-1] == 12
    # nothing left: it only tests
    run("finetune.py", *flags, "--out", tmp_path / "parts", "--resume", "auto")


def test_a_run_goes_on_without_the_checkpoint_that_it_began_from(world, tmp_path):
    """Its own holds all weights, and what its flags left to the other: size, frames and stride."""
    flags = [*TINY, "--data", world / "data/train.csv", "--val", world / "data/val.csv"]
    flags = flags[flags.index("tiny") + 1 :]  # without --size
    first = tmp_path / "first/checkpoint.pt"
    first.parent.mkdir()
    saved = {"stage": "pretrain.py", "size": "tiny", "frames": 4, "stride": 3}
    model = models.VideoMAE("tiny", frames=4)
    torch.save({"model": model.state_dict(), "args": saved}, first)
    flags += ["--checkpoint", first, "--out", tmp_path / "run"]
    out = run("finetune.py", *flags, "--max-steps", 1)
    assert f"weights      {first}: " in out
    first.unlink()
    latest = tmp_path / "run/checkpoint.pt"
    out = run("finetune.py", *flags, "--max-steps", 2, "--resume", "auto")
    assert f"weights      {latest}, where the run goes on\n" in out
    args = json.loads((tmp_path / "run/args.json").read_text())
    assert [args[name] for name in ("size", "frames", "stride")] == ["tiny", 4, 3]
    torch.save({"model": model.state_dict(), "args": saved}, first)
    flags[-1] = tmp_path / "whole"
    run("finetune.py", *flags, "--max-steps", 2)
    whole = weights(tmp_path / "whole/checkpoint.pt")
    parts = weights(latest)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def start(*args, cwd):
    """finetune.py in a process group of its own."""
    command = [sys.executable, str(ROOT / "finetune.py"), *map(str, args)]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_ends_by_it(world, tmp_path, number):
    process = start(
        *TINY,
        "--epochs",
        1000,
        "--log-every",
        1,
        "--data",
        world / "data/train.csv",
        "--val",
        world / "data/val.csv",
        "--out",
        tmp_path,
        cwd=tmp_path,
    )
    while not process.stdout.readline().startswith("step "):
        assert process.poll() is None
    os.killpg(process.pid, number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == -number and f"{number.name}: saved" in out, errors
    assert f"{number.name}: saving after this step" in errors
    assert (
        torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
        == log(tmp_path)[-1]["step"]
    )


def test_two_ranks_stop_at_the_same_step_and_save(copy):
    """Between log lines, and only one rank is told. A slow loader makes an epoch take seconds, so
    that the signal comes while it trains."""
    (copy / "slow.py").write_text(f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import finetune
from tgm.run import launch
fetch = finetune.TrainingLog.fetch
def slow(self, batches):
    time.sleep(0.2)
    return fetch(self, batches)
finetune.TrainingLog.fetch = slow
launch(finetune.main)
""")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = [*TINY, "--batch-size", 1, "--log-every", 100000, "--views", 1, 1, "--out", "run"]
    process = subprocess.Popen(
        [sys.executable, *launcher, "slow.py", *map(str, flags)],
        cwd=copy,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    while "val_top1" not in process.stdout.readline():
        assert process.poll() is None, process.communicate()
    time.sleep(1)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    os.kill(int(ranks.stdout.split()[-1]), signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and ": saved run/checkpoint.pt at step" in out, errors
    # both ranks end by the signal; to torchrun that is a failure
    assert errors.count(f"exitcode  : -{signal.SIGTERM.value}") == 2, errors
    saved = torch.load(copy / "run/checkpoint.pt", weights_only=True)
    assert 16 < saved["step"] == log(copy / "run")[-1]["step"] < 32


def test_a_loss_that_is_not_finite_stops_both_ranks_with_one_line(copy):
    (copy / "nan.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import finetune
from tgm.run import launch
forward = finetune.models.VideoViT.forward
finetune.models.VideoViT.forward = lambda self, video: forward(self, video) * float("nan")
launch(finetune.main)
""")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, "nan.py", *map(str, TINY), "--out", "run"]
    done = subprocess.run(command, cwd=copy, env=ENVIRONMENT, capture_output=True, text=True)
    (line,) = [line for line in done.stderr.splitlines() if "not finite" in line]
    assert line.startswith("step 1: the loss or its gradient is not finite; the last checkpoint")
    assert line.count(".mp4") == 16 and done.returncode == 1
    assert not (copy / "run/checkpoint.pt").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ("--sampling", "uniform"),
        ("--sampling", "dense", "--flip"),
        ("--amp", "bf16"),
        ("--amp", "fp16"),
        ("--amp", "off", "--clip-grad", 0.5),
        ("--checkpointing", "--rand-augment", 0, 0),
        ("--use", "last", "--label-column", "object"),
        ("--frames", 4, "--image-size", 64, "--layer-decay", 1),
    ],
    ids=str,
)
def test_every_choice_trains(world, tmp_path, flags):
    run(
        "finetune.py",
        *TINY,
        "--data",
        world / "data/train.csv",
        "--val",
        world / "data/val.csv",
        "--out",
        tmp_path,
        "--max-steps",
        2,
        *flags,
    )
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "checkpoint.pt").values())


def test_label_smoothing_reaches_the_loss(world, tmp_path):
    flags = (
        *TINY,
        "--data",
        world / "data/train.csv",
        "--val",
        world / "data/val.csv",
        *"--max-steps 4 --blr 0.04 --views 1 1 --mixup 0 --cutmix 0".split(),
    )
    for name, smoothing in (("hard", 0), ("soft", 0.5)):
        run("finetune.py", *flags, "--smoothing", smoothing, "--out", tmp_path / name)
    # the mean of steps 3 and 4
    hard, soft = (log(tmp_path / name)[1]["loss"] for name in ("hard", "soft"))
    assert hard != soft and soft < 3


def test_it_learns(world, tmp_path):
    """The object of 32 videos by heart, from scratch."""
    data = (
        "--data",
        world / "data/train.csv",
        "--val",
        world / "data/train.csv",
        "--label-column",
        "object",
    )
    run(
        "finetune.py",
        *TINY,
        *data,
        *(
            "--epochs 30 --blr 0.16 --layer-decay 1 --mixup 0 --cutmix 0 --rand-augment 0 0 "
            "--erase 0 --crop-scale 0.9 1 --repeat 4 --frames 2 --log-every 60"
        ).split(),
        "--out",
        tmp_path,
    )
    assert json.loads((tmp_path / "test.json").read_text())["top1"] > 0.9


def test_others_checkpoints(world, tmp_path):
    """A Hugging Face classifier is tested as it is with numbers for labels, and gives up its
    head to be trained on.
    """
    torch.manual_seed(0)
    model = models.VideoViT("tiny", classes=3)
    model.head.weight.data.normal_()
    checkpoints.save_huggingface(model, tmp_path / "hf")
    lines = (world / "data/val.csv").read_text().splitlines()[1:8]
    (tmp_path / "numbers.csv").write_text(
        "path,label\n"
        + "".join(f"{world}/data/{line.split(',')[0]},{i % 3}\n" for i, line in enumerate(lines))
    )
    flags = ("--size", "tiny", "--workers", 0, "--views", 1, 1)
    run(
        "finetune.py",
        *flags,
        "--test-only",
        "--checkpoint",
        tmp_path / "hf",
        "--test",
        tmp_path / "numbers.csv",
        "--out",
        tmp_path / "out",
    )
    summary = json.loads((tmp_path / "out/test.json").read_text())
    assert (summary["videos"], summary["classes"], summary["top5"]) == (7, 3, 1.0)
    out = run(
        "finetune.py",
        *TINY,
        "--data",
        world / "data/train.csv",
        "--val",
        world / "data/val.csv",
        "--checkpoint",
        tmp_path / "hf",
        "--max-steps",
        1,
        "--out",
        tmp_path / "ft",
    )
    assert "hf: encoder loaded; new: classifier (2 keys)\n" in out and "8 classes" in out


def test_class_names_of_a_huggingface_folder(world, tmp_path):
    """Labels may be the names, also where these are numbers in another order, or the numbers of the
    outputs: always the same accuracy."""
    torch.manual_seed(0)
    model = models.VideoViT("tiny", classes=3)
    model.head.weight.data.normal_()
    videos = (world / "data/val.csv").read_text().splitlines()[1:13]
    accuracies = []
    for names, labels in (
        (["wave", "run", "jump"], ["wave", "run", "jump"]),
        (["1", "2", "0"], ["1", "2", "0"]),
        (["wave", "run", "jump"], ["0", "1", "2"]),
    ):
        folder = tmp_path / f"hf{len(accuracies)}"
        checkpoints.save_huggingface(model, folder, names)
        if names != labels:
            folder = folder / "model.safetensors"  # its config.json is found beside it
        rows = [f"{world}/data/{v.split(',')[0]},{labels[i % 3]}" for i, v in enumerate(videos)]
        (tmp_path / "test.csv").write_text("\n".join(["path,label", *rows, ""]))
        flags = ("--test-only", "--checkpoint", folder, "--test", tmp_path / "test.csv")
        out = run("finetune.py", *flags, "--views", 1, 1, "--workers", 0, "--out", tmp_path / "out")
        noted = "note: the labels are taken as numbers of the 3 classes, not as names" in out
        assert noted == (names != labels)
        accuracies.append(json.loads((tmp_path / "out/test.json").read_text())["top1"])
    assert 0 < accuracies[0] < 1 and len(set(accuracies)) == 1, accuracies
    (tmp_path / "test.csv").write_text(f"path,label\n{world}/data/{videos[0].split(',')[0]},swim\n")
    line = run("finetune.py", *flags, cwd=tmp_path, fails=True)
    assert line.endswith("none of its labels is among the classes wave, run, jump")


def test_bad_videos(copy):
    (copy / "data/bad.mp4").write_bytes(b"not a video")
    for split in ("train", "val"):
        lines = (copy / f"data/{split}.csv").read_text().splitlines()
        lines[4] = "bad.mp4" + lines[4][lines[4].index(",") :]
        (copy / f"data/{split}.csv").write_text("\n".join(lines) + "\n")
    assert "24 videos, 1 unreadable" in run(
        "finetune.py", *TINY, "--out", "a", "--epochs", 1, cwd=copy
    )
    assert "more than --max-bad 0.01: bad.mp4" in run(
        "finetune.py", *TINY, "--out", "b", "--max-bad", 0.01, cwd=copy, fails=True
    )


def test_refusals_name_what_mends(copy):
    assert "python data/toy.py" in run("finetune.py", cwd=copy / "data", fails=True, process=True)
    assert "nowhere.pt: no checkpoint there (pretrain.py writes runs/NAME/checkpoint.pt)" in run(
        "finetune.py", *TINY, "--checkpoint", "nowhere.pt", cwd=copy, fails=True
    )
    huge = ("--image-size", 8192, "--frames", 256)
    assert "lower --batch-size, --repeat, --frames or --image-size" in run(
        "finetune.py", *TINY, *huge, cwd=copy, fails=True
    )
    rows = list(csv.DictReader((copy / "data/train.csv").read_text().splitlines()))
    label = rows[0]["label"]
    one = [row for row in rows if row["label"] == label]
    with open(copy / "data/one.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, one[0])
        writer.writeheader()
        writer.writerows(one)
    assert f"data/one.csv: all its videos have one label, {label!r}" in run(
        "finetune.py", *TINY, "--data", "data/one.csv", cwd=copy, fails=True
    )
    gone = [row | {"path": f"gone{number}"} for number, row in enumerate(one)]
    with open(copy / "data/gone.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, one[0])
        writer.writeheader()
        writer.writerows(gone + rows)
    for split in ("--data", "--val", "--test"):
        line = run("finetune.py", *TINY, split, "data/gone.csv", cwd=copy, fails=True)
        assert f"{len(gone)} of {len(gone) + 32} videos that were looked for are not there" in line
    assert "lower --batch-size" in run(
        "finetune.py", *TINY, "--batch-size", 33, cwd=copy, fails=True
    )
    assert "a column 'kind'" in run(
        "finetune.py", *TINY, "--label-column", "kind", cwd=copy, fails=True
    )
    assert "--test-only tests the classifier of a --checkpoint" in run(
        "finetune.py", *TINY, "--test-only", cwd=copy, fails=True
    )
    torch.save({"model": models.VideoMAE("tiny").state_dict()}, copy / "pre.pt")
    assert "holds no classifier" in run(
        "finetune.py", *TINY, "--test-only", "--checkpoint", "pre.pt", cwd=copy, fails=True
    )
    assert "does not fit VideoViT" in run(
        "finetune.py",
        *TINY,
        *"--size small --image-size 32 --checkpoint pre.pt".split(),
        cwd=copy,
        fails=True,
    )
    (copy / "data/none.csv").write_text("path\nvideos/val/00000.mp4\n")
    assert "has no label" in run(
        "finetune.py", *TINY, "--val", "data/none.csv", cwd=copy, fails=True
    )
    (copy / "data/other.csv").write_text("path,label\nvideos/val/00000.mp4,juggle\n")
    assert "none of its labels is among the classes move down" in run(
        "finetune.py", *TINY, "--val", "data/other.csv", cwd=copy, fails=True
    )
    if not torch.cuda.is_available():
        assert "no GPU" in run("finetune.py", *TINY, "--device", "cuda", cwd=copy, fails=True)


# ---- VideoMAE's recipes


def recipes():
    """The rows of the table in docs/datasets.md: data set, source, videos x samples, learning rate,
    floor, flags.
    """
    page = (ROOT / "docs/datasets.md").read_text(encoding="utf-8")
    table = page[page.index("| data set | source |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_recipes_are_those_of_videomaes_scripts():
    """videos, samples, epochs, lr x videos / 256 and min_lr x videos / 256 of each script."""
    expected = {
        "VideoMAE's epoch_1600": ("384 x 2", 75, 7.5e-4, 1.5e-6),
        "VideoMAE's FINETUNE.md": ("512 x 1", 100, 2e-3, 2e-6),
        "VideoMAE's epoch_2400": ("384 x 2", 30, 7.5e-4, 1.5e-6),
        "VideoMAE's epoch_800": ("512 x 1", 50, 1e-3, 2e-6),
        "VideoMAE's epoch_3200": ("128 x 2", 100, 2.5e-4, 5e-6),
    }
    found = {}
    for _, source, videos, lr, floor, flags in recipes():
        if source != "ours":
            args = finetune.parse_args(flags.strip("`").split())
            found[source] = (videos, args.epochs, float(lr), float(floor))
    assert found == expected


def test_recipes_give_their_learning_rates():
    """From the flags, on eight GPUs; the rate rises to lr, and falls to the floor."""
    [ucf101] = [flags for name, *_, flags in recipes() if name == "UCF101"]
    seen = 0
    for _, _, size, lr, floor, flags in recipes():
        lr, floor = float(lr), float(floor)
        if flags == "those of UCF101":
            flags = ucf101
        args = finetune.parse_args(flags.strip("`").split())
        videos = args.batch_size * args.accum * 8
        assert size == f"{videos} x {args.repeat}"
        assert args.blr * videos / 256 == pytest.approx(lr)
        assert args.min_blr * videos / 256 == pytest.approx(floor)
        steps = args.epochs * 100
        rates = [
            finetune.learning_rate(step, lr, 500, steps, floor) for step in (0, 499, 500, steps - 1)
        ]
        assert rates == [pytest.approx(lr / 500), lr, lr, pytest.approx(floor, rel=0.2)]
        assert rates[-1] >= floor
        seen += 1
    assert seen == 8


def test_the_commands_take_the_first_recipe_of_their_data_set():
    page = (ROOT / "docs/datasets.md").read_text(encoding="utf-8").replace("\\\n", "")
    commands = [" ".join(line.split()) for line in page.splitlines() if "finetune.py" in line]
    first = {}
    for name, *_, flags in recipes():
        first.setdefault(name, flags.strip("`"))
    first.pop("HMDB51")  # takes UCF101's
    assert len(first) == 5
    for name, flags in first.items():
        assert any(flags in command for command in commands), name


@pytest.mark.parametrize("repeat, accum", [(1, 1), (3, 1), (2, 2)])
def test_the_learning_rate_counts_videos_and_not_repeats(world, tmp_path, repeat, accum):
    """0.032 x 8 x accum / 256, which falls to a floor of the same scale."""
    out = run(
        "finetune.py",
        *TINY,
        "--data",
        world / "data/train.csv",
        "--val",
        world / "data/val.csv",
        "--out",
        tmp_path,
        "--log-every",
        1,
        "--repeat",
        repeat,
        "--accum",
        accum,
        *"--blr 0.032 --min-blr 0.016 --views 1 1".split(),
    )
    rates = [line["lr"] for line in log(tmp_path) if "loss" in line]
    steps = 12 // accum
    lr, floor = 1e-3 * accum, 5e-4 * accum
    last = floor + (lr - floor) * 0.5 * (
        1 + math.cos(math.pi * (steps - 1 - steps // 3) / (steps - steps // 3))
    )
    assert (
        len(rates) == steps and max(rates) == pytest.approx(lr) and rates[-1] == pytest.approx(last)
    )
    assert f"lr           {lr:g} = 0.032 x {8 * accum} videos / 256, down to {floor:g}; " in out
    assert f"batch        {8 * accum * repeat} = 8 videos x {repeat} repeats x {accum} " in out


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0), (0, 1.0)])
def test_repeats_are_mixed_with_other_videos(mixup, cutmix):
    """Eight videos of eight classes, two samples each: every target has two classes, and each
    sample keeps its own.
    """
    torch.manual_seed(0)
    clips = torch.arange(8.0).view(8, 1, 1, 1, 1, 1).expand(8, 2, 3, 2, 16, 16)
    labels = torch.arange(8)[:, None].expand(8, 2)
    mix = finetune.make_mix(mixup, cutmix, 8)
    flat, own = finetune.repeats_first(clips), finetune.repeats_first(labels)
    assert flat.shape == (16, 3, 2, 16, 16) and torch.equal(flat[:, 0, 0, 0, 0], own.float())
    for _ in range(20):
        mixed, targets = mix(flat.clone(), own)
        share = targets[0, own[0]].item()
        if 0.001 < share < 0.999:
            assert ((targets > 0).sum(1) == 2).all()
        # what is in the clip, and what the target says
        seen = torch.stack([mixed.mean((1, 2, 3, 4)), targets @ torch.arange(8.0)])
        assert torch.allclose(*seen, atol=1e-4)


def test_a_run_mixes_different_videos(world, tmp_path, monkeypatch):
    seen = []
    entropy = finetune.F.cross_entropy
    monkeypatch.setattr(
        finetune.F,
        "cross_entropy",
        lambda logits, target, **flags: seen.append(target) or entropy(logits, target, **flags),
    )
    lines = (world / "data/train.csv").read_text().splitlines()[1:9]
    rows = [f"{world}/data/{line.split(',')[0]},{number}" for number, line in enumerate(lines)]
    (tmp_path / "eight.csv").write_text("path,label\n" + "\n".join(rows) + "\n")
    run(
        "finetune.py",
        *TINY,
        "--data",
        tmp_path / "eight.csv",
        "--val",
        tmp_path / "eight.csv",
        *"--epochs 6 --mixup 1 --views 1 1".split(),
        "--out",
        tmp_path / "run",
    )
    mixed = [target for target in seen if 0.01 < target.max() < 0.99]
    assert len(mixed) >= 3
    for target in mixed:
        assert target.shape == (16, 8) and ((target > 0).sum(1) == 2).all()


def test_each_operation_of_rand_augment_comes_with_probability_one_half(world, monkeypatch):
    """Of four: binomial, none in a sixteenth of the samples."""
    counts = []
    apply = v2.RandAugment._apply_image_or_video_transform

    def counted(self, *args, **flags):
        counts[-1] += 1
        return apply(self, *args, **flags)

    monkeypatch.setattr(v2.RandAugment, "_apply_image_or_video_transform", counted)
    data = clips_of(world, "--erase", 0)
    frames = torch.randint(0, 256, (1, 3, 24, 24), dtype=torch.uint8)
    for seed in range(1600):
        counts.append(0)
        data.augment(frames, seed)
    found = np.bincount(counts, minlength=5)
    expected = np.array([1, 4, 6, 4, 1]) * 100
    assert len(found) == 5 and (np.abs(found - expected) < 4 * expected**0.5).all(), found


def test_erasing_fills_in_noise_of_pixel_targets(world):
    """Mean 0 and deviation 1 after normalisation, but for what a byte cannot hold; the same in
    every frame.
    """
    data = clips_of(world, "--erase", 1, "--rand-augment", 0, 0, "--crop-scale", 1, 1, "--no-flip")
    frames = torch.full((4, 3, 64, 64), 7, dtype=torch.uint8)
    noise, shares = [], []
    for seed in range(300):
        clip = data.augment(frames, seed)
        assert clip.dtype == torch.uint8 and torch.equal(clip, clip[:, :1].expand_as(clip))
        box = (clip[:, 0] != 7).any(0)
        shares.append(box.float().mean().item())
        noise.append(models.normalize(clip[None])[0, :, 0][:, box])
    noise = torch.cat(noise, 1)  # [3, pixels]
    assert noise.mean(1).abs().max() < 0.03 and ((noise.std(1) - 0.97).abs() < 0.05).all(), (
        noise.mean(1),
        noise.std(1),
    )
    assert (
        0.01 < min(shares)
        and max(shares) < 0.36
        and np.mean(shares) == pytest.approx(0.175, abs=0.03)
    )


def test_dropout_before_the_head():
    torch.manual_seed(0)
    model = models.VideoViT("tiny", classes=4, head_dropout=0.5)
    model.head.weight.data.normal_()
    assert set(model.state_dict()) == set(models.VideoViT("tiny", classes=4).state_dict())
    seen = []
    model.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    video = torch.randn(64, 3, 8, 48, 48)
    model.train()
    model(video)
    model.eval()
    model(video)
    kept = seen[0] != 0
    assert kept.float().mean().item() == pytest.approx(0.5, abs=0.03) and torch.allclose(
        seen[0][kept], 2 * seen[1][kept]
    )


# ---- going on with a run


def test_resumed_with_other_flags_it_is_refused(copy):
    base = (*TINY, "--views", 1, 1, "--out", "run")
    run("finetune.py", *base, "--max-steps", 5, cwd=copy)
    before = (copy / "run/checkpoint.pt").read_bytes()

    def refused(*flags):
        line = run("finetune.py", *base, "--resume", "auto", *flags, cwd=copy, fails=True)
        assert line.startswith("run/checkpoint.pt: another run: ") and "--resume none" in line
        assert (copy / "run/checkpoint.pt").read_bytes() == before
        return line

    for flag, value, was in (
        ("--blr", 0.01, 0.0005),
        ("--min-blr", 0.1, 1e-06),
        ("--layer-decay", 0.5, 0.75),
        ("--weight-decay", 0.1, 0.05),
        ("--seed", 7, 0),
        ("--warmup-epochs", 2, 1.0),
        ("--mixup", 0, 0.8),
        ("--repeat", 1, 2),
        ("--smoothing", 0, 0.1),
        ("--drop-path", 0, 0.2),
        ("--head-dropout", 0.5, 0.0),
        ("--clip-grad", 1, 0.0),
        ("--erase", 0, 0.25),
        ("--sampling", "uniform", "dense"),
        ("--stride", 1, 2),
        ("--label-column", "object", "label"),
        ("--epochs", 2, 3),
    ):
        line = refused(flag, value)
        assert f"{flag} was {was}, is {type(was)(value)}" in line, line
    assert "--flip was False, is True" in refused("--flip")
    assert "batch size x accum x ranks was 8, is 4" in refused("--batch-size", 4)
    assert "batch size x accum x ranks was 8, is 16" in refused("--accum", 2)
    # nor is resuming suggested
    assert "another run: --blr" in run("finetune.py", *base, "--blr", 1, cwd=copy, fails=True)
    assert "--resume auto goes on" in run("finetune.py", *base, cwd=copy, fails=True)

    csv_path = copy / "data/train.csv"
    text = csv_path.read_text()
    lines = text.splitlines()
    first = lines[1].split(",")
    other = next(line.split(",")[1] for line in lines[2:] if line.split(",")[1] != first[1])
    csv_path.write_text(
        "\n".join([lines[0], ",".join([first[0], other, *first[2:]]), *lines[2:]]) + "\n"
    )
    assert "another run: data/train.csv was " in refused()
    csv_path.write_text("\n".join(lines[:-1]) + "\n")
    assert "another run: data/train.csv was " in refused()
    csv_path.write_text(text)
    val = (copy / "data/val.csv").read_text()
    (copy / "data/val.csv").write_text("\n".join(val.splitlines()[:-1]) + "\n")
    assert "another run: data/val.csv was " in refused()
    (copy / "data/val.csv").write_text(val)
    (copy / "other.csv").write_text(text.replace("videos/", f"{copy}/data/videos/"))
    assert "--data was data/train.csv, is other.csv" in refused("--data", "other.csv")

    run(
        "finetune.py",
        *base,
        *(
            "--resume auto --epochs 4 --batch-size 4 --accum 2 --workers 1 "
            "--log-every 1 --views 2 1 --max-bad 0.5 --use best"
        ).split(),
        cwd=copy,
    )
    assert log(copy / "run")[-1]["step"] == 16


def test_two_ranks_go_on_with_a_run_of_one(copy):
    flags = [*TINY, "--views", 1, 1, "--out", "run"]
    run("finetune.py", *flags, "--max-steps", 3, cwd=copy)
    flags[flags.index("--batch-size") + 1] = 4
    run(
        "finetune.py",
        *flags,
        *"--resume auto --max-steps 6 --use best".split(),
        cwd=copy,
        ranks=2,
    )
    assert log(copy / "run")[-1]["step"] == 6
    flags[flags.index("--batch-size") + 1] = 8
    assert "batch size x accum x ranks was 8, is 16" in run(
        "finetune.py", *flags, "--resume", "auto", "--accum", 2, cwd=copy, fails=True
    )


def test_another_stages_checkpoint_is_refused(copy):
    run(
        "pretrain.py",
        *(
            "--size tiny --batch-size 8 --epochs 1 --warmup-epochs 0 --workers 0 "
            "--out run --mask tube --picture-every 0"
        ).split(),
        cwd=copy,
    )
    for flags in ((), ("--resume", "auto")):
        assert "run/checkpoint.pt: no checkpoint of finetune.py" in run(
            "finetune.py", *TINY, "--out", "run", *flags, cwd=copy, fails=True
        )


def test_begun_again_and_killed_it_does_not_go_on_with_the_run_before(copy):
    flags = (*TINY, "--views", 1, 1, "--out", "run")
    run("finetune.py", *flags, cwd=copy)
    before = weights(copy / "run/checkpoint.pt")
    process = start(*flags, "--resume", "none", "--seed", 5, cwd=copy)
    while not process.stdout.readline().startswith("lr "):
        assert process.poll() is None
    while not (copy / "run/checkpoint.old.pt").exists():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (copy / "run/checkpoint.pt").exists() and not (copy / "run/best.pt").exists()
    kept = weights(copy / "run/checkpoint.old.pt")
    assert all(torch.equal(kept[key], before[key]) for key in before)
    assert "from step 0" in run(
        "finetune.py", *flags, "--resume", "auto", "--seed", 5, "--max-steps", 1, cwd=copy
    )


def test_a_finished_test_of_other_weights_is_taken_away(copy):
    flags = (*TINY, "--views", 1, 1, "--out", "run")
    run("finetune.py", *flags, "--max-steps", 1, cwd=copy)
    assert (copy / "run/test.json").exists()
    (copy / "data/bad.csv").write_text("path,label\nnone.mp4,spin left\n")
    (copy / "data/none.mp4").write_bytes(b"")
    line = run(
        "finetune.py",
        *flags,
        *"--max-steps 2 --resume auto --test data/bad.csv".split(),
        cwd=copy,
        fails=True,
    )
    assert line.startswith("none of the 1 videos to be tested can be read: ") and "none.mp4" in line
    assert not (copy / "run/test.json").exists()


@pytest.mark.parametrize("when", ["validation", "test"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_validation_and_test_at_once(copy, when, number):
    """A prediction that takes a hundred seconds is not waited for. After that the run goes on as
    if nothing had been.
    """
    flags = (*TINY, "--views", 1, 1, "--save-every", 1)
    run("finetune.py", *flags, "--out", "whole", "--epochs", 2, cwd=copy)
    (copy / "slow.py").write_text(f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import finetune
from tgm import evaluation
from tgm.run import launch
predict = evaluation.predict
def slow(*args, **settings):
    if {when!r} == "test" and sys._getframe(2).f_code.co_name == "validate":
        return predict(*args, **settings)
    print("begins", flush=True)
    time.sleep(100)
evaluation.predict = slow
launch(finetune.main)
""")
    command = [
        sys.executable,
        str(copy / "slow.py"),
        *map(str, flags),
        *"--out run --epochs 2 --resume auto".split(),
    ]
    process = subprocess.Popen(
        command,
        cwd=copy,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    while process.stdout.readline() != "begins\n":
        assert process.poll() is None
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == -number, errors
    assert f"{number.name}: ended: --resume auto " in errors and "Traceback" not in errors
    assert torch.load(copy / "run/checkpoint.pt", weights_only=True)["step"] == (
        4 if when == "validation" else 8
    )
    assert not (copy / "run/test.json").exists()
    run("finetune.py", *flags, "--out", "run", "--epochs", 2, "--resume", "auto", cwd=copy)
    ran, whole = log(copy / "run"), log(copy / "whole")
    assert [line["val_top1"] for line in ran if "val_top1" in line] == [
        line["val_top1"] for line in whole if "val_top1" in line
    ]
    assert [line["grad_norm"] for line in ran if "loss" in line] == [
        line["grad_norm"] for line in whole if "loss" in line
    ]
    assert (copy / "run/test.json").read_text() == (copy / "whole/test.json").read_text().replace(
        "whole/", "run/"
    )


# ---- what goes wrong


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_best_of_several_ranks(copy, ranks):
    """A slow disk: best.pt is there only after half a second. Every rank waits for it."""
    (copy / "late.py").write_text(f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import finetune
from tgm import checkpoints
from tgm.run import launch
save = checkpoints.save_checkpoint
def late(path, **content):
    time.sleep(0.5)
    save(path, **content)
checkpoints.save_checkpoint = late
launch(finetune.main)
""")
    flags = [
        *TINY,
        *"--epochs 1 --use best --views 1 1 --out run".split(),
        "--batch-size",
        8 // ranks,
    ]
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        if ranks > 1
        else []
    )
    done = subprocess.run(
        [sys.executable, *launcher, "late.py", *map(str, flags)],
        cwd=copy,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and (copy / "run/test.json").exists(), done.stderr


def test_bad_videos_are_counted_over_the_ranks(copy):
    """Four of 32 are bad, shared out over the ranks by chance: neither meets more than 0.1 of
    all in the first epoch.
    """
    lines = (copy / "data/train.csv").read_text().splitlines()
    for row in (1, 2, 3, 4):
        (copy / f"data/bad{row}.mp4").write_bytes(b"bad")
        lines[row] = f"bad{row}.mp4," + lines[row].split(",", 1)[1]
    (copy / "data/train.csv").write_text("\n".join(lines) + "\n")
    flags = [*TINY, "--epochs", 3, "--views", 1, 1, "--log-every", 4, "--batch-size", 4]
    assert "4 of 32 videos cannot be read, more than --max-bad 0.1" in run(
        "finetune.py", *flags, "--max-bad", 0.1, "--out", "a", cwd=copy, fails=True
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [
        sys.executable,
        *launcher,
        str(ROOT / "finetune.py"),
        *map(str, flags),
        "--max-bad",
        "0.1",
        "--out",
        "b",
    ]
    done = subprocess.run(command, cwd=copy, env=ENVIRONMENT, capture_output=True, text=True)
    assert (
        done.returncode == 1
        and "4 of 32 videos cannot be read, more than --max-bad 0.1: bad" in done.stderr
    ), done.stderr
    assert log(copy / "b") == []  # at the first line that would be logged
    # over many epochs each rank meets all of them, and they are four still
    run("finetune.py", *flags, "--epochs", 6, "--max-bad", 0.125, "--out", "c", cwd=copy, ranks=2)
    assert log(copy / "c")[-2]["skipped"] == 4


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kept", [0, 1])
def test_all_videos_gone_or_most_broken_is_one_line(copy, workers, kept):
    lines = (copy / "data/train.csv").read_text().splitlines()
    (copy / "data/train.csv").write_text(
        "\n".join([*lines[: 1 + kept], *("gone/" + line for line in lines[1 + kept :])]) + "\n"
    )
    for line in lines[1 + kept :] if kept else ():
        path = copy / "data/gone" / line.split(",")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"bad")
    command = [
        sys.executable,
        str(ROOT / "finetune.py"),
        *map(str, TINY),
        "--workers",
        str(workers),
    ]
    done = subprocess.run(command, cwd=copy, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    lines = done.stderr.strip().splitlines()
    said = [line for line in lines if line.startswith("skipped: ")]
    # a worker may write after it
    (last,) = [line for line in lines if not line.startswith("skipped: ")]
    if kept == 0:  # said before any work
        assert (
            said == []
            and "none of its 32 videos is there: searched " in last
            and "--root FOLDER" in last
        )
        return
    assert (
        "Invalid data found" in last
        and "and nine videos drawn in its place cannot be read either: are the paths right (--root)?"
        in last
    )
    assert len(said) <= 3 * max(1, workers)


def test_validation_videos_that_are_gone_are_not_listed_one_by_one(copy, capsys):
    lines = (copy / "data/val.csv").read_text().splitlines()
    (copy / "data/val.csv").write_text(
        "\n".join([*lines[:3], *("gone/" + line for line in lines[3:])]) + "\n"
    )
    videos = read_manifest(copy / "data/val.csv")
    views = Views(videos, frames=8, image_size=48, stride=2)
    model = models.VideoViT("tiny", classes=4)
    found = evaluation.predict(model, views, classes=4, **ON_THE_CPU)
    assert found.isnan().any(1).sum() == 22
    said = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("counted as wrong")
    ]
    assert len(said) == 4 and said[-1] == "counted as wrong: 19 more"


@pytest.mark.parametrize("name", ["args.json", "log.jsonl", "per_class.csv", "test.json"])
def test_a_full_disk_is_one_line_with_the_reason(copy, name, monkeypatch):
    (copy / "run").mkdir()
    written = name
    if name == "log.jsonl":
        # it puts a new file in the link's place
        monkeypatch.setattr(resume, "keep_log", lambda path, step: None)
    if name in ("args.json", "test.json"):
        written = f"{name}.new"  # it is written aside
    (copy / "run" / written).symlink_to("/dev/full")
    line = run("finetune.py", *TINY, "--max-steps", 1, "--out", "run", cwd=copy, fails=True)
    assert line == f"run/{name}: cannot be written (No space left on device)"


def test_a_test_that_was_not_finished_leaves_no_older_result(copy, monkeypatch):
    run("finetune.py", *TINY, "--max-steps", 1, "--out", "run", cwd=copy)
    assert (copy / "run/test.json").exists()

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation, "draw_confusion", fails)
    again = ("--test-only", "--checkpoint", "run/checkpoint.pt", "--views", 2, 1)
    line = run("finetune.py", *TINY, *again, "--out", "run", cwd=copy, fails=True)
    assert line == "run/confusion.png: cannot be written (No space left on device)"
    assert not (copy / "run/test.json").exists()


def test_testing_again_reads_the_column_that_was_trained_on(copy):
    column = ("--label-column", "object")
    run("finetune.py", *TINY, *column, "--max-steps", 1, "--out", "run", cwd=copy)
    again = ("--test-only", "--checkpoint", "run/checkpoint.pt", "--views", 2, 1, "--workers", 0)
    run("finetune.py", *again, cwd=copy)
    summaries = [
        json.loads((copy / name).read_text()) for name in ("run/test.json", "run/test/test.json")
    ]
    first, second = summaries
    assert second["top1"] == first["top1"] and second["label"] == first["label"] == "object"
    line = run("finetune.py", *again, "--label-column", "label", cwd=copy, fails=True)
    assert "data/val.csv" in line


def test_training_videos_in_the_other_manifests_are_counted(copy):
    lines = (copy / "data/train.csv").read_text().splitlines(keepends=True)
    (copy / "data/seen.csv").write_text("".join(lines[:6]))
    data = ("--val", "data/seen.csv", "--test", "data/val.csv", "--max-steps", 1)
    out = run("finetune.py", *TINY, *data, cwd=copy)
    assert "note: 5 of 5 val videos are training videos, too" in out and "test videos" not in out


def test_a_large_model_on_a_cpu_is_told_what_it_takes(copy):
    small = ("--size", "small", "--frames", 2, "--image-size", 32, "--max-steps", 1)
    out = run("finetune.py", *TINY, *small, "--views", 1, 1, "--out", "small", cwd=copy)
    assert re.search(r"--size small on a CPU: about [0-9.e+-]+ s per step, [0-9.e+-]+ hours", out)
    assert "on a CPU" not in run("finetune.py", *TINY, "--max-steps", 1, "--out", "t", cwd=copy)


def test_numbers_without_meaning_are_refused_when_they_are_read(copy):
    for flags, said in (
        (("--views", 0, 1), "--views: expected 1 to"),
        (("--rand-augment", 4, 31), "--rand-augment: expected 0 to 30, found 31"),
        (("--smoothing", "nan"), "--smoothing: expected"),
        (("--layer-decay", -1), "--layer-decay: expected a finite number, more than 0"),
        (("--crop-scale", 1, 0.5), "--crop-scale: expected MIN before MAX"),
        (("--min-blr", -1), "--min-blr: expected a finite number, 0 or more"),
        (("--head-dropout", 2), "--head-dropout: expected"),
        (("--repeat", 10**9), "--repeat: expected 1 to 1024"),
    ):
        assert said in run("finetune.py", *flags, cwd=copy, fails=True)
    run("finetune.py", *TINY, "--rand-augment", 4, 30, "--max-steps", 1, "--views", 1, 1, cwd=copy)


def test_the_banner_says_what_is_left_out_and_a_warm_up_without_end(copy):
    out = run(
        "finetune.py",
        *TINY,
        *"--batch-size 9 --max-steps 1 --views 1 1 --warmup-epochs 3 --out a".split(),
        cwd=copy,
    )
    assert "each epoch leaves out 5 videos, others each time" in out
    assert "the warm-up of 3 epochs lasts the whole run" in out
    out = run("finetune.py", *TINY, "--max-steps", 1, "--views", 1, 1, "--out", "b", cwd=copy)
    assert "left out" not in out and "leaves out" not in out
