"""Stage 4: layer-wise decay, mixing, views and metrics against written-out references; then the command line."""
import csv
import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ENVIRONMENT, ROOT, run
from PIL import Image

import evaluate
import finetune
import model as models
from manifest import read_manifest

TINY = ("--size", "tiny", "--batch-size", 8, "--epochs", 3, "--warmup-epochs", 1, "--log-every", 2, "--workers", 0, "--no-flip",
        "--views", 2, 1, "--drop-path", 0.2)


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_layer_wise_decay():
    model = models.VideoViT("tiny", classes=5)  # three blocks
    optimizer = finetune.make_optimizer(model, 1.0, 0.5, 0.05)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    expected = {"patch_embed": 1 / 16, "blocks.0": 1 / 8, "blocks.1": 1 / 4, "blocks.2": 1 / 2, "fc_norm": 1, "head": 1}
    assert len(found) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        rate = next(rate for start, rate in expected.items() if name.startswith(start))
        still = name.endswith("bias") or "norm" in name
        assert found[id(parameter)] == (rate, 0.0 if still else 0.05), name
    lines = finetune.layer_table(optimizer, 3).splitlines()
    assert [line.split("lr")[0].strip() for line in lines] == ["patch embedding", "block 0", "block 1", "block 2", "norm and head"]
    assert "0.25" in lines[2]


def test_learning_rate_is_that_of_pretraining():
    import pretrain
    for step in (0, 3, 10, 50, 99):
        assert finetune.learning_rate(step, 0.1, 10, 100, 1e-5) == pretrain.learning_rate(step, 0.1, 10, 100)


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0), (0, 1.0), (0, 0), (0.8, 1.0)])
def test_mixing_and_its_targets(mixup, cutmix):
    """Mixup: x_i and the sample before it, by the share that the target says; cutmix: one box of it, of just that share."""
    torch.manual_seed(0)
    clips, labels = torch.rand(4, 3, 2, 16, 16), torch.tensor([0, 1, 2, 3])
    mix, kinds = finetune.make_mix(mixup, cutmix, 5), set()
    for _ in range(12):
        mixed, targets = mix(clips.clone(), labels)
        assert mixed.shape == clips.shape and targets.shape == (4, 5) and torch.allclose(targets.sum(1), torch.ones(4))
        share = targets[0, 0].item()
        assert torch.allclose(targets, share * F.one_hot(labels, 5) + (1 - share) * F.one_hot(labels.roll(1), 5), atol=1e-6)
        before = clips.roll(1, 0)
        if torch.allclose(mixed, share * clips + (1 - share) * before, atol=1e-5):
            kinds.add("mixup" if share < 1 else "none")
        else:
            taken = (mixed == before).all((0, 1, 2))                                         # [H, W], the same for all frames
            assert torch.equal(mixed, torch.where(taken, before, clips)) and taken.float().mean().item() == pytest.approx(1 - share)
            kinds.add("cutmix")
    kinds.discard("none")
    assert kinds == {name for name, alpha in (("mixup", mixup), ("cutmix", cutmix)) if alpha}


def clips_of(world, *flags):
    args = finetune.parse_args(["--data", str(world / "data/train.csv"), *map(str, flags)])
    vars(args).update(frames=8, image_size=32, stride=2)
    videos = read_manifest(args.data)
    return finetune.Clips(videos, np.arange(len(videos)), list(range(len(videos))), args)


def test_a_sample_is_a_function_of_seed_epoch_row_and_repeat(world):
    data, again = clips_of(world, "--repeat", 3), clips_of(world, "--repeat", 3)
    first = data[2, 7]
    data[1, 3]
    torch.manual_seed(99)
    assert torch.equal(again[2, 7]["clip"], first["clip"]) and first["label"].tolist() == [7] * 3
    assert first["clip"].shape == (3, 3, 8, 32, 32) and first["clip"].dtype == torch.uint8
    assert not torch.equal(first["clip"][0], first["clip"][1]) and not torch.equal(data[1, 7]["clip"], first["clip"])


def test_every_frame_is_augmented_alike(world):
    """Eight copies of one frame stay eight copies of one frame, whatever is done to them."""
    data = clips_of(world, "--erase", 1)
    frames = torch.randint(0, 256, (1, 3, 48, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).expand(8, -1, -1, -1)
    seen = []
    for seed in range(20):
        clip = data.augment(frames, seed)
        assert torch.equal(clip, clip[:, :1].expand_as(clip))
        seen.append(clip[:, 0])
    assert len(torch.stack(seen).unique(dim=0)) == 20
    plain = clips_of(world, "--erase", 0, "--rand-augment", 0, 0, "--crop-scale", 1, 1, "--no-flip")
    square = frames[..., :48]
    expected = F.interpolate(square.float(), (32, 32), mode="bilinear", antialias=True).transpose(0, 1)
    assert (plain.augment(square, 3) - expected).abs().max() < 1.5  # torch's own uint8 arithmetic is within one of the float's


def test_uniform_sampling_spreads_over_the_video(world, monkeypatch):
    wanted = []
    monkeypatch.setattr(finetune.VideoReader, "read", lambda self, times: wanted.append(times) or np.zeros((8, 64, 64, 3), np.uint8))
    clips_of(world, "--sampling", "uniform")[0, 0]
    clips_of(world)[0, 0]
    uniform, dense = wanted
    assert (np.floor(uniform / 0.25) == np.arange(8)).all() and np.allclose(np.diff(dense), 0.2)


# ---- testing


def test_prediction_is_the_mean_softmax_over_views_and_bad_videos_are_wrong(world):
    torch.manual_seed(0)
    model = models.VideoViT("tiny", classes=4)
    model.head.weight.data.normal_()
    args = finetune.parse_args(["--workers", "0"])
    vars(args).update(frames=8, image_size=32, stride=2)
    videos = read_manifest(world / "data/val.csv")[:5]
    videos[3] = videos[3]._replace(path="gone.mp4")
    import contextlib
    found = evaluate.predict(model, videos, 4, (2, 3), args, "cpu", contextlib.nullcontext())
    assert model.training and found.shape == (5, 4) and found[3].isnan().all()
    model.eval()
    with torch.no_grad():
        for row in (0, 1, 2, 4):
            views = evaluate.Views(videos, 8, 32, 2, 2, 3)[row][1]
            by_view = [model(models.normalize(view[None])).softmax(-1)[0] for view in views]
            assert torch.allclose(found[row], sum(by_view) / 6, atol=1e-5) and len(by_view) == 6


def test_scores_against_loops():
    generator = torch.Generator().manual_seed(0)
    probabilities, labels = torch.rand(200, 7, generator=generator), torch.randint(-1, 6, (200,), generator=generator)  # class 6 is absent
    probabilities[5] = probabilities[11] = math.nan
    result = evaluate.score(probabilities, labels, 7)
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
    assert result["top1"] == pytest.approx(top1 / 200) and result["top5"] == pytest.approx(top5 / 200)
    assert result["mean_class"] == pytest.approx(np.mean([right[c] / total[c] for c in range(6)])) and result["per_class"][6].isnan()
    assert np.array_equal(result["confusion"], confusion)


def test_bootstrap_interval():
    correct = torch.arange(400) < 300
    low, high = evaluate.bootstrap(correct)
    spread = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - spread, abs=0.01) and high == pytest.approx(0.75 + spread, abs=0.01)
    assert evaluate.bootstrap(torch.ones(9, dtype=torch.bool)) == [1.0, 1.0]


@pytest.mark.parametrize("classes", [2, 9, 60, 700])
def test_confusion_picture(tmp_path, classes):
    confusion = torch.eye(classes, dtype=torch.long) * 5
    confusion[0] = 0
    confusion[0, 1] = 3
    evaluate.draw_confusion(tmp_path / "c.png", confusion, [f"a class of the name {c}" for c in range(classes)])
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.size[0] == picture.size[1] <= 1620
        cell = max(2, min(36, 1200 // classes))
        margin = picture.size[0] - 4 - cell * classes
        at = lambda i, j: picture.getpixel((margin + j * cell + cell - 2, margin + i * cell + 1 + (cell > 3)))
        assert at(0, 1) == at(1, 1) == (20, 60, 130) and at(0, 0) == (255, 255, 255)


# ---- the command line


def test_from_a_pretrained_encoder_to_a_test(world, tmp_path):
    """Trains, validates, tests, writes its files; best and last; then --test-only gives the same numbers."""
    run("pretrain.py", "--data", world / "data/train.csv", "--size", "tiny", "--batch-size", 8, "--epochs", 1, "--workers", 0, "--out",
        tmp_path / "pre", "--mask", "tube")
    data = ("--data", world / "data/train.csv", "--val", world / "data/val.csv")
    out = run("finetune.py", *TINY, *data, "--checkpoint", tmp_path / "pre/checkpoint.pt", "--out", tmp_path / "ft", "--use", "best")
    assert "unused norm.weight" in out and "block 2" in out and "24 videos, 0 unreadable, 2 x 1 views" in out
    lines = log(tmp_path / "ft")
    assert [line["step"] for line in lines if "val_top1" in line] == [4, 8, 12]
    best = torch.load(tmp_path / "ft/best.pt", weights_only=True)
    first = max((line for line in lines if "val_top1" in line), key=lambda line: line["val_top1"])  # of equals, the first
    assert best["best"] == first["val_top1"] and best["step"] == first["step"]
    groups = torch.load(tmp_path / "ft/checkpoint.pt", weights_only=True)["optimizer"]["param_groups"]
    assert len({group["scale"] for group in groups}) == 5 and np.ptp([group["lr"] / group["scale"] for group in groups]) < 1e-12
    summary = json.loads((tmp_path / "ft/test.json").read_text())
    labels = [[video.label for video in read_manifest(world / f"data/{split}.csv")] for split in ("train", "val")]
    assert summary["majority"] in {np.mean([label == common for label in labels[1]]) for common in set(labels[0])
                                   if labels[0].count(common) == max(map(labels[0].count, labels[0]))}
    assert summary["videos"] == 24 and summary["checkpoint"].endswith("best.pt") and summary["top1_bootstrap"][0] <= summary["top1"]
    with open(tmp_path / "ft/per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == sorted({video.label for video in read_manifest(world / "data/train.csv")})
    assert sum(int(row["videos"]) for row in rows) == 24
    shares = [float(row["accuracy"]) for row in rows if row["accuracy"]]
    assert np.mean(shares) == pytest.approx(summary["mean_class"], abs=1e-4)
    assert (tmp_path / "ft/confusion.png").stat().st_size > 500
    run("finetune.py", "--test-only", "--checkpoint", tmp_path / "ft/best.pt", "--test", world / "data/val.csv", "--views", 2, 1, "--workers", 1,
        "--out", tmp_path / "again")
    again = json.loads((tmp_path / "again/test.json").read_text())
    assert {key: again[key] for key in ("top1", "top5", "mean_class", "top1_bootstrap")} == {key: summary[key] for key in
           ("top1", "top5", "mean_class", "top1_bootstrap")}


def test_two_ranks_test_as_one_does(copy):
    """23 test videos, which two ranks cannot share evenly: the same accuracy, each video once."""
    lines = (copy / "data/val.csv").read_text().splitlines()
    (copy / "data/odd.csv").write_text("\n".join(lines[:-1]) + "\n")
    run("finetune.py", *TINY, "--max-steps", 6, "--out", "one", cwd=copy)
    flags = ("--test-only", "--checkpoint", "one/checkpoint.pt", "--test", "data/odd.csv", "--views", 2, 3, "--workers", 0, "--batch-size", 12)
    run("finetune.py", *flags, "--out", "alone", cwd=copy)
    run("finetune.py", *flags, "--out", "both", cwd=copy, ranks=2)
    alone, both = (json.loads((copy / name / "test.json").read_text()) for name in ("alone", "both"))
    assert alone == both and alone["videos"] == 23
    assert (copy / "alone/per_class.csv").read_text() == (copy / "both/per_class.csv").read_text()


def test_two_ranks_train_as_one_does(copy):
    flags = [*TINY, "--max-steps", 3, "--mixup", 0, "--cutmix", 0, "--drop-path", 0, "--views", 1, 1]  # which know one rank's batch
    flags[flags.index("--batch-size") + 1] = 16
    run("finetune.py", *flags, "--out", "one", cwd=copy)
    flags[flags.index("--batch-size") + 1] = 8
    run("finetune.py", *flags, "--out", "two", cwd=copy, ranks=2)
    one, two = weights(copy / "one/checkpoint.pt"), weights(copy / "two/checkpoint.pt")
    assert all(torch.allclose(one[key], two[key], atol=2e-5) for key in one)


def test_accumulation_is_a_larger_batch(world, tmp_path):
    flags = [*TINY, "--data", world / "data/train.csv", "--val", world / "data/val.csv", "--max-steps", 2, "--mixup", 0, "--cutmix", 0,
             "--drop-path", 0, "--views", 1, 1]
    run("finetune.py", *flags, "--accum", 2, "--out", tmp_path / "accum")
    flags[flags.index("--batch-size") + 1] = 16
    run("finetune.py", *flags, "--out", tmp_path / "large")
    accum, large = weights(tmp_path / "accum/checkpoint.pt"), weights(tmp_path / "large/checkpoint.pt")
    assert all(torch.allclose(accum[key], large[key], atol=2e-5) for key in accum)


def test_resumed_it_is_the_uninterrupted_run(world, tmp_path):
    """Stopped within an epoch by SIGTERM's path and after one by --max-steps; drop path, mixup and augmentation on."""
    flags = (*TINY, "--data", world / "data/train.csv", "--val", world / "data/val.csv")
    run("finetune.py", *flags, "--out", tmp_path / "whole")
    run("finetune.py", *flags, "--out", tmp_path / "parts", "--max-steps", 3)
    assert "is there already: --resume auto" in run("finetune.py", *flags, "--out", tmp_path / "parts", fails=True)
    run("finetune.py", *flags, "--out", tmp_path / "parts", "--max-steps", 8, "--resume", "auto", "--workers", 4)
    run("finetune.py", *flags, "--out", tmp_path / "parts", "--resume", "auto")
    whole, parts = weights(tmp_path / "whole/checkpoint.pt"), weights(tmp_path / "parts/checkpoint.pt")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert json.loads((tmp_path / "whole/test.json").read_text())["top1"] == json.loads((tmp_path / "parts/test.json").read_text())["top1"]
    steps = [line["step"] for line in log(tmp_path / "parts") if "loss" in line]
    assert steps == sorted(set(steps)) and steps[-1] == 12
    run("finetune.py", *flags, "--out", tmp_path / "parts", "--resume", "auto")  # nothing left: it only tests


def test_sigterm_saves_and_exits_0(world, tmp_path):
    command = ["finetune.py", *TINY, "--epochs", 1000, "--log-every", 1, "--data", world / "data/train.csv", "--val", world / "data/val.csv", "--out", tmp_path]
    process = subprocess.Popen([sys.executable, str(ROOT / command[0]), *map(str, command[1:])], env=ENVIRONMENT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    while not process.stdout.readline().startswith("step "):
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "SIGTERM: saved" in out, errors
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == log(tmp_path)[-1]["step"]


@pytest.mark.parametrize("flags", [
    ("--sampling", "uniform"), ("--sampling", "dense", "--flip"), ("--amp", "bf16"), ("--amp", "fp16"), ("--amp", "off", "--clip-grad", 0.5),
    ("--checkpointing", "--rand-augment", 0, 0), ("--use", "last", "--label-column", "object"), ("--frames", 4, "--image-size", 64, "--layer-decay", 1),
], ids=str)
def test_every_choice_trains(world, tmp_path, flags):
    run("finetune.py", *TINY, "--data", world / "data/train.csv", "--val", world / "data/val.csv", "--out", tmp_path, "--max-steps", 2, *flags)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "checkpoint.pt").values())


def test_label_smoothing_reaches_the_loss(world, tmp_path):
    flags = (*TINY, "--data", world / "data/train.csv", "--val", world / "data/val.csv", "--max-steps", 4, "--blr", 0.04, "--views", 1, 1,
             "--mixup", 0, "--cutmix", 0)
    for name, smoothing in (("hard", 0), ("soft", 0.5)):
        run("finetune.py", *flags, "--smoothing", smoothing, "--out", tmp_path / name)
    hard, soft = (log(tmp_path / name)[1]["loss"] for name in ("hard", "soft"))  # the mean of steps 3 and 4
    assert hard != soft and soft < 3


def test_it_learns(world, tmp_path):
    """The object of 32 videos by heart, from scratch."""
    data = ("--data", world / "data/train.csv", "--val", world / "data/train.csv", "--label-column", "object")
    run("finetune.py", *TINY, *data, "--epochs", 30, "--blr", 0.08, "--layer-decay", 1, "--mixup", 0, "--cutmix", 0, "--rand-augment", 0, 0,
        "--erase", 0, "--crop-scale", 0.9, 1, "--repeat", 4, "--log-every", 60, "--out", tmp_path)
    assert json.loads((tmp_path / "test.json").read_text())["top1"] > 0.9


def test_others_checkpoints(world, tmp_path):
    """A Hugging Face classifier is tested as it is with numbers for labels, and gives up its head to be trained on."""
    torch.manual_seed(0)
    model = models.VideoViT("tiny", classes=3)
    model.head.weight.data.normal_()
    models.save_huggingface(model, tmp_path / "hf")
    lines = (world / "data/val.csv").read_text().splitlines()[1:8]
    (tmp_path / "numbers.csv").write_text("path,label\n" + "".join(f"{world}/data/{line.split(',')[0]},{i % 3}\n" for i, line in enumerate(lines)))
    flags = ("--size", "tiny", "--workers", 0, "--views", 1, 1)
    run("finetune.py", *flags, "--test-only", "--checkpoint", tmp_path / "hf", "--test", tmp_path / "numbers.csv", "--out", tmp_path / "out")
    summary = json.loads((tmp_path / "out/test.json").read_text())
    assert (summary["videos"], summary["classes"], summary["top5"]) == (7, 3, 1.0)
    out = run("finetune.py", *TINY, "--data", world / "data/train.csv", "--val", world / "data/val.csv", "--checkpoint", tmp_path / "hf",
              "--max-steps", 1, "--out", tmp_path / "ft")
    assert "missing head.weight" in out and "8 classes" in out


def test_bad_videos(copy):
    (copy / "data/bad.mp4").write_bytes(b"not a video")
    for split in ("train", "val"):
        lines = (copy / f"data/{split}.csv").read_text().splitlines()
        lines[4] = "bad.mp4" + lines[4][lines[4].index(","):]
        (copy / f"data/{split}.csv").write_text("\n".join(lines) + "\n")
    assert "24 videos, 1 unreadable" in run("finetune.py", *TINY, "--out", "a", "--epochs", 1, cwd=copy)
    assert "more than --max-bad 0.01: bad.mp4" in run("finetune.py", *TINY, "--out", "b", "--max-bad", 0.01, cwd=copy, fails=True)


def test_refusals_name_what_mends(copy):
    assert "python data/toy.py" in run("finetune.py", cwd=copy / "data", fails=True, process=True)
    assert "nowhere.pt: no such file" in run("finetune.py", *TINY, "--checkpoint", "nowhere.pt", cwd=copy, fails=True)
    assert "lower --batch-size" in run("finetune.py", *TINY, "--batch-size", 33, cwd=copy, fails=True)
    assert "a column 'kind'" in run("finetune.py", *TINY, "--label-column", "kind", cwd=copy, fails=True)
    torch.save({"model": models.VideoMAE("tiny").state_dict()}, copy / "pre.pt")
    assert "holds no classifier" in run("finetune.py", *TINY, "--test-only", "--checkpoint", "pre.pt", cwd=copy, fails=True)
    assert "does not fit VideoViT" in run("finetune.py", *TINY, "--size", "small", "--image-size", 32, "--checkpoint", "pre.pt", cwd=copy, fails=True)
    (copy / "data/none.csv").write_text("path\nvideos/val/00000.mp4\n")
    assert "has no label" in run("finetune.py", *TINY, "--val", "data/none.csv", cwd=copy, fails=True)
    (copy / "data/other.csv").write_text("path,label\nvideos/val/00000.mp4,juggle\n")
    assert "none of its labels is among the classes grow" in run("finetune.py", *TINY, "--val", "data/other.csv", cwd=copy, fails=True)
    if not torch.cuda.is_available():
        assert "no GPU" in run("finetune.py", *TINY, "--device", "cuda", cwd=copy, fails=True)
