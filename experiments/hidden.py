"""How much of the actor and of the bystander each mask of the study hides: a table of RESULTS.md.

    # after experiments/study.py has made the toy world and the maps; half a minute
    python experiments/hidden.py

Of the first --videos of data/train.csv, in the middle clip of each, whose whole frame is cut into
the model's tokens. A thing's share is that of its visible pixels, over all frames of the clip.

Shapes: N videos, T frames of a clip, (t, h, w) tokens, H W pixels.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "experiments")]
import study
import toy

import masking
import model as models
from tgm.arrays import open_array
from tgm.flags import Parser, positive_int
from tgm.manifest import ManifestError, read_manifest
from tgm.run import RunError, launch, one_line_errors
from tgm.sampling import clip_times

SECONDS = toy.FRAMES / toy.FPS


def things(path, count, times):
    """Where a thing is seen in the frames at these times of the first videos: bool [N, T, H, W].
    path: data/toy.py's packed bits [videos, frames, H, W / 8]; times [T]: seconds."""
    frames = np.floor(times * toy.FPS + 1e-6).astype(int)
    packed = np.load(path, mmap_mode="r")[:count, frames]
    return torch.from_numpy(np.unpackbits(packed, axis=-1).astype(bool))


def hidden_share(mask, grid, seen):
    """The share of a thing's visible pixels that is hidden, the mean over videos; and the share of
    the videos in which it is hidden whole. mask [N, t*h*w]; seen: bool [N, T, H, W]."""
    frames_per_token = seen.shape[1] // grid[0]
    hidden = mask.unflatten(1, grid).float().repeat_interleave(frames_per_token, dim=1)
    hidden = F.interpolate(hidden, seen.shape[2:]) > 0.5  # each pixel that of its token
    inside = (hidden & seen).sum((1, 2, 3)) / seen.sum((1, 2, 3))  # NaN where it is never seen
    whole = (inside == 1).sum() / (~inside.isnan()).sum()
    return inside.nanmean().item(), whole.item()


def measure(data, maps, count):
    """Yields (mask, share of the actor, share of videos without a trace of the actor, share of the
    bystander). maps: the folder of the study's other maps."""
    videos = read_manifest(data)
    count = min(count, len(videos))
    prefix = Path(data).with_suffix("")
    encoder = models.Encoder("tiny")
    frames, stride = encoder.config["frames"], encoder.config["stride"]
    grid = encoder.grid
    times = clip_times(0, SECONDS, toy.FPS, frames, stride, 0.5)
    middles = torch.from_numpy(times.reshape(grid[0], -1).mean(1) / SECONDS).float()
    place = {
        "times": middles.expand(count, -1),
        "box": torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(count, -1),
        "flip": torch.zeros(count, dtype=torch.bool),
        "grid": grid,
    }
    actor = things(f"{prefix}.masks.npy", count, times)
    bystander = things(f"{prefix}.bystander.npy", count, times)

    def read(path, command):
        try:
            array, _ = open_array(path, videos, command)
        except ManifestError as error:  # the flags of its remedy are not those of controls.py
            reason = str(error).split("; make it with")[0]
            raise RunError(f"{reason}; delete what is left of it, then: {command}") from None
        return torch.from_numpy(array[:count].copy())

    command = f"python saliency.py --data {data}"
    field = read(f"{prefix}.motion.npy", f"{command} --cue motion --grid 8")
    motion = masking.cut_motion(field, **place, seconds=torch.full((count,), SECONDS))
    own = read(f"{prefix}.saliency.npy", f"{command} --clip local-dir:data/toy/clip --moments 8")
    rows = [(f"{mask} 0.6", mask, 0.6, own) for mask in masking.MASKS]
    rows.append(("tube 0.9", "tube", 0.9, None))
    for source in study.SOURCES:
        command = f"python experiments/controls.py {source} --data {data} --out {maps / source}"
        saliency = read(maps / f"{source}.saliency.npy", command)
        rows.append((f"text of {source} 0.6", "text", 0.6, saliency))
    for label, name, ratio, saliency in rows:
        guide = {}
        if masking.NEEDS[name] == "saliency":
            guide["saliency"] = masking.cut_maps(saliency[:, 0], **place)  # the first caption's
        elif masking.NEEDS[name] == "motion":
            guide["motion"] = motion
        generator = torch.Generator().manual_seed(0)
        mask = masking.make_mask(name, ratio, count, grid, generator=generator, **guide)
        share, whole = hidden_share(mask, grid, actor)
        share_of_bystander, _ = hidden_share(mask, grid, bystander)
        yield label, share, whole, share_of_bystander


@one_line_errors
def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--data", default="data/train.csv", help="data/toy.py's manifest")
    parser.add_argument(
        "--maps", type=Path, default=study.OUT / "maps", help="folder of the study's other maps"
    )
    parser.add_argument("--videos", type=positive_int, default=600, help="so many are looked at")
    args = parser.parse_args(argv)
    rows = sorted(measure(args.data, args.maps, args.videos), key=lambda row: row[1])
    print("| mask and ratio | hides of the actor | whole, in videos | of the bystander |")
    print("|---|---|---|---|")
    for name, *shares in rows:
        print(f"| {name} | " + " | ".join(f"{share:.2f}" for share in shares) + " |")


if __name__ == "__main__":
    launch(main)
