"""The pictures of experiments/study.py; each function returns a matplotlib figure. `python
experiments/study.py --gather` draws them.

Letters: N tokens, T frames, H W pixels, (t, h, w) token grid, S moments, G grid, K captions.
"""

import argparse
import json
import sys
from pathlib import Path
from unittest import mock

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import masking
import model as models
import pretrain
from tgm.arrays import open_array, read_captions
from tgm.manifest import read_manifest
from tgm.video import VideoReader


def accuracies(found, measures):
    """found: {(what, contrastive weight or None): {measure: (mean, half of the interval or
    None)}}; a line each `what`.
    """
    names = list(dict.fromkeys(what for what, _ in found))
    figure, axes = plt.subplots(
        1,
        len(measures),
        figsize=(2.2 + 2.1 * len(measures), 1 + 0.3 * len(names)),
        sharey=True,
        squeeze=False,
    )
    style = {
        None: ("D", "black", "black", 0),
        0.0: ("s", "tab:blue", "white", -0.15),
        1.0: ("o", "tab:red", "tab:red", 0.15),
    }
    for axis, measure in zip(axes[0], measures):
        for (what, nce), means in found.items():
            if measure in means:
                (mean, half), (mark, colour, face, shift) = means[measure], style[nce]
                axis.errorbar(
                    mean,
                    names.index(what) + shift,
                    xerr=half,
                    fmt=mark,
                    color=colour,
                    mfc=face,
                    ms=5,
                    capsize=2,
                    lw=1,
                )
        axis.set_title(measure, fontsize=9)
        axis.grid(axis="x", alpha=0.4)
        axis.tick_params(labelsize=8)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].invert_yaxis()
    handles = [
        plt.Line2D([], [], marker=mark, color=colour, mfc=face, ls="", label=label)
        for (mark, colour, face, _), label in zip(
            style.values(),
            ("no pretraining", "contrastive loss monitored (weight 0)", "optimised (weight 1)"),
        )
    ]
    figure.legend(
        handles=handles,
        loc="upper center",
        ncols=3,
        fontsize=8,
        frameon=False,
        bbox_to_anchor=(0.5, 0.02),
    )
    return figure


def contrastive(logs):
    """The paper's figure 4. logs: {(what, contrastive weight): [[line of log.jsonl, ...] of each
    seed, ...]}; smoothed over a 20th.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    names = list(dict.fromkeys(what for what, _ in logs))
    for (what, nce), of_seeds in logs.items():
        length = min(map(len, of_seeds))
        window = max(1, length // 20)
        losses = np.mean([[line["loss_nce"] for line in log[:length]] for log in of_seeds], 0)
        steps = [line["step"] for line in of_seeds[0][window - 1 : length]]
        axes[int(nce > 0)].plot(
            steps,
            np.convolve(losses, np.ones(window) / window, "valid"),
            label=what,
            color=f"C{names.index(what)}",
            lw=1.3,
        )
    for axis, title in zip(axes, ("monitored (weight 0)", "optimised (weight 1)")):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.4)
        if axis.lines:
            axis.legend(fontsize=8, loc="upper right")
    axes[0].set_ylabel("contrastive loss")
    return figure


def attention(model, video):
    """How much each token of a whole clip is attended to in the encoder's last block: float [N],
    the mean over heads and queries.
    """
    kept, attn = [], model.encoder.blocks[-1].attn
    hook = attn.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    with torch.no_grad():
        model.encode(video)
        hook.remove()
        bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
        q, k, _ = (
            (attn.qkv(kept[0]) + bias).unflatten(-1, (3, attn.heads, -1)).unbind(2)
        )  # [1, N, heads, D / heads]
        return (
            (torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5)
            .softmax(-1)
            .mean((0, 1, 2))
        )


def middle_square(height, width):
    """In place of a random crop: top, left, height, width in pixels."""
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def reconstructions(folders, row):
    """The paper's figures 3 and 5, of one video's middle square: {name: folder of a pretraining
    run}, a line each.
    """
    titles = ("clip", "what the encoder sees", "reconstruction*", "attention, all tokens seen")
    lines = {}
    for name, folder in folders.items():
        run = argparse.Namespace(**json.loads((folder / "args.json").read_text()))
        model = models.VideoMAE(run.size, run.frames, run.image_size, run.text_dim).eval()
        models.load_pretrained(model, folder / "checkpoint.pt")
        run.flip, run.repeat = False, 1
        videos, rows, arrays, _ = pretrain.open_data(
            run.data, run.mask, run.nce_weight, run.root, run.companions
        )
        clips = pretrain.make_clips(videos, rows, model.grid, arrays, run)
        with mock.patch.object(pretrain, "multi_scale_crop", middle_square):
            sample = torch.utils.data.default_collate([clips[0, row]])
        sample = {key: value.flatten(0, 1) for key, value in sample.items() if value.ndim > 1}
        mask, video = (
            pretrain.mask_batch(sample, run.mask, run.mask_ratio, model.grid),
            models.normalize(sample["clip"]),
        )
        big = lambda tokens: F.interpolate(
            tokens.float().view(1, 1, *model.grid), video.shape[2:], mode="nearest"
        )[0, 0]  # [T, H, W]
        clip = sample["clip"][0] / 255  # [3, T, H, W]
        seen = torch.where(big(mask) > 0, torch.full_like(clip, 0.55), clip)
        attended = 0.35 * clip + 0.65 * masking.heat(big(attention(model, video))).permute(
            3, 0, 1, 2
        )
        lines[name] = [
            strip[:, :: model.config["tubelet"]]
            for strip in (clip, seen, model.reconstruct(video, mask)[0], attended)
        ]
    slices = next(iter(lines.values()))[0].shape[1]
    figure, axes = plt.subplots(
        len(lines),
        4,
        figsize=(3.4 * slices, 1.0 * len(lines)),
        squeeze=False,
        gridspec_kw=dict(wspace=0.03, hspace=0.06),
    )
    for of_axes, (name, strips) in zip(axes, lines.items()):
        for axis, strip in zip(of_axes, strips):
            axis.imshow(
                torch.cat(list(strip.unbind(1)), -1).permute(1, 2, 0).clamp(0, 1).numpy(),
                interpolation="nearest",
            )
            axis.set(xticks=[], yticks=[])
        of_axes[0].set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=10)
    figure.text(
        0.5,
        0.06,
        "* flattered: the true mean and deviation of each masked patch are borrowed from the clip",
        ha="center",
        fontsize=9,
    )
    return figure


def saliency(data, prefixes, row, count=4):
    """Saliency of a few videos from `row` on, at their middle: {title: PREFIX}, a column each;
    where a PREFIX.captions.jsonl is, the caption that made the map stands over it."""
    videos = read_manifest(data)
    remedy = "python experiments/study.py"
    maps = {
        title: open_array(f"{prefix}.saliency.npy", videos, remedy)[0]
        for title, prefix in prefixes.items()
    }
    captions = {
        title: read_captions(f"{prefix}.captions.jsonl", videos, remedy)
        for title, prefix in prefixes.items()
        if Path(f"{prefix}.captions.jsonl").exists()
    }
    moments = next(iter(maps.values())).shape[2]
    figure, axes = plt.subplots(
        count, 1 + len(maps), figsize=(1.9 * (1 + len(maps)), 2.1 * count), squeeze=False
    )
    for of_axes, video in zip(axes, videos[row : row + count]):
        with VideoReader(video.path) as reader:
            start, end = reader.span(video)
            frame = reader.read(np.array([start + (moments // 2 + 0.5) * (end - start) / moments]))[
                0
            ]
        of_axes[0].imshow(frame)
        of_axes[0].set_title("frame", fontsize=8)
        for axis, (title, array) in zip(of_axes[1:], maps.items()):
            axis.imshow(frame)
            where = (-0.5, frame.shape[1] - 0.5, frame.shape[0] - 0.5, -0.5)
            axis.imshow(
                array[video.row, 0, moments // 2].astype(np.float32),
                extent=where,
                cmap="bwr",
                alpha=0.6,
            )
            axis.set_title(
                f"{title}: {captions[title][video.row][0]}" if title in captions else title,
                fontsize=8,
            )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    return figure
