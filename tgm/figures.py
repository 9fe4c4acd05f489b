"""What a pretrained model makes of a clip: what its encoder sees of it, the reconstruction, and
where its encoder attends (like figures 3 and 5 of TGM, by notes on them).

    python -m tgm.figures --checkpoint runs/text/checkpoint.pt --data data/val.csv --row 3

Reads   a manifest, one video, the map that the mask follows, and a checkpoint: of pretrain.py,
        a VideoMAE .pth, a Hugging Face folder of a pretrained VideoMAE; none is an untrained one
Writes  one picture with four rows and a column per token slice; prints the reconstruction loss of
        this clip

Shapes: T frames, H W pixels, (t, h, w) token grid, N tokens, D width.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import masking
from model import SIZES, Encoder, VideoMAE, normalize
from tgm import checkpoints, flags, pictures, preview
from tgm.features import FrozenEncoder, load_encoder
from tgm.manifest import Videos, read_manifest
from tgm.run import RunError, choose_device, one_line_errors


@torch.no_grad()
def attention_of(encoder: Encoder, video: Tensor) -> Tensor:
    """How much each token of one whole clip is attended to in the last block of the encoder: the
    mean over its heads and over the tokens that attend. float [N], which adds up to 1.

    video [1, 3, T, H, W], normalised. `Attention` in model.py never holds these weights: they are
    computed here from its input."""
    inputs = []
    attention = encoder.blocks[-1].attn
    hook = attention.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    try:
        encoder.encode_cubes(encoder.to_cubes(video))
    finally:
        hook.remove()
    bias = torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])
    qkv = F.linear(inputs[0], attention.qkv.weight, bias)  # [1, N, 3 * D]
    # each [1, heads, N, D / heads]
    q, k, _ = qkv.unflatten(-1, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # [1, heads, N, N]
    return scores.softmax(dim=-1).mean(dim=(0, 1, 2))


def four_rows(model: VideoMAE, clip: Tensor, video: Tensor, mask: Tensor) -> pictures.Tiles:
    """The four rows of the picture.

    clip: float [3, T, H, W] in [0, 1]; video: the same normalised, [1, 3, T, H, W]; mask: bool
        [1, N]. Video and mask are on the model's device."""
    attention = attention_of(model.encoder, video).view(model.grid).cpu()
    made = model.reconstruct(video, mask)[0].cpu()
    tiles = pictures.draw_tiles(clip, {"seen": mask[0].cpu()}, model.grid, saliency=attention)
    return {
        "clip": tiles["clip"],
        "what the encoder sees": tiles["seen"],
        "reconstruction": made.permute(1, 2, 3, 0),
        "attention, all tokens seen": tiles["saliency"],
    }


def read_mask(
    args: argparse.Namespace, videos: Videos, clip: preview.Clip, grid: masking.Grid
) -> tuple[Tensor, str]:
    """The mask of a clip, bool [1, N], and a title for the picture."""
    maps = {}
    video = videos[args.row]
    title = video.name
    need = masking.NEEDS[args.mask]
    prefix = preview.prefix_of(args.data, args.companions)
    if need == "saliency":
        saliency = preview.open_saliency(args.data, prefix, videos)
        stored, caption = saliency.read(video, args.caption)
        title = f"{title}: {caption}"
        maps["saliency"] = masking.cut_maps(stored[None], *clip.place(grid))
    if need == "motion":
        path = Path(f"{prefix}.motion.npy")
        remedy = preview.motion_command(args.data, prefix)
        stored = preview.read_motion(path, videos, args.row, remedy)
        if stored is None:
            reason = preview.why_no_motion(path, title, remedy)
            raise RunError(f"--row {args.row}: {reason}; or choose another row")
        seconds = torch.tensor([clip.seconds])
        maps["motion"] = masking.cut_motion(stored[None], *clip.place(grid), seconds)
    generator = torch.Generator().manual_seed(args.seed)
    try:
        mask = masking.make_mask(args.mask, args.mask_ratio, 1, grid, generator=generator, **maps)
    except ValueError as error:
        raise RunError(f"--mask-ratio {args.mask_ratio}: {error}") from None
    return mask, title


# ---- the command line ----------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = flags.Parser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="a file or a folder; none: untrained")
    parser.add_argument(
        "--size", choices=tuple(SIZES), help="for a checkpoint that does not say (default: base)"
    )
    parser.add_argument("--data", default="data/val.csv", help="the manifest")
    parser.add_argument(
        "--companions",
        metavar="PREFIX",
        help="read PREFIX.saliency.npy or PREFIX.motion.npy in place of the manifest's own",
    )
    flags.add_video_flags(parser)
    parser.add_argument("--row", type=flags.count, default=0, help="row of the manifest, from 0")
    parser.add_argument(
        "--caption", type=flags.count, default=0, help="which of the video's captions, from 0"
    )
    parser.add_argument(
        "--mask",
        choices=tuple(masking.MASKS),
        help="default: the mask that the checkpoint was trained with, or tube",
    )
    parser.add_argument(
        "--mask-ratio",
        type=flags.ratio,
        help="default: as the checkpoint was trained with this mask, or the mask's own",
    )
    parser.add_argument(
        "--seed", type=flags.seed_number, default=0, help="another seed draws another random mask"
    )
    parser.add_argument(
        "--device", type=flags.device_name, default="auto", help="auto, cpu, cuda or cuda:N"
    )
    parser.add_argument("--out", type=Path, default="figure.png", help="picture to write")
    return parser.parse_args(argv)


def load_autoencoder(args: argparse.Namespace) -> FrozenEncoder:
    """The whole VideoMAE, as the `model` of a FrozenEncoder. Sets args.mask and args.mask_ratio
    where their flags were not given."""
    device, _ = choose_device(args.device)
    loaded = load_encoder(args.checkpoint, size=args.size, device=device)
    if args.checkpoint != "none":
        keys = checkpoints.read_checkpoint(args.checkpoint)
        if not any(key.startswith("decoder.") for key in keys):
            raise RunError(
                f"--checkpoint {args.checkpoint}: has no decoder, so it reconstructs nothing; "
                "give a checkpoint of pretraining"
            )
    saved = checkpoints.saved_args(args.checkpoint)
    args.mask = args.mask or saved.get("mask", "tube")
    if args.mask == saved.get("mask"):
        args.mask_ratio = args.mask_ratio or saved.get("mask_ratio")
    args.mask_ratio = args.mask_ratio or masking.RATIOS[args.mask]
    return loaded


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    pictures.require_writable("--out", args.out, pictures.STILL)
    videos = read_manifest(args.data, args.root)
    if args.row >= len(videos):
        raise RunError(f"--row {args.row}: {args.data} has rows 0 to {len(videos) - 1}")
    loaded = load_autoencoder(args)
    model = loaded.model
    clip = preview.read_clip(
        videos[args.row], loaded.frames, loaded.stride, loaded.image_size, args.video_timeout
    )
    mask, title = read_mask(args, videos, clip, model.grid)
    mask = mask.to(loaded.device)
    video = normalize(preview.to_bytes(clip.frames[None]).to(loaded.device))
    with torch.no_grad():
        loss = model(video, mask).loss_mae.item()
    tiles = four_rows(model, clip.frames, video, mask)
    title = f"{title} ({args.mask} {args.mask_ratio:g}, loss {loss:.3f})"
    title += "; reconstructed with each cube's true mean and deviation, which flatters it"
    with pictures.saving("--out", args.out):
        pictures.draw_strip(tiles, model.grid[0], title).save(args.out)
    print(f"{args.out}: reconstruction loss {loss:.4f} with {args.mask} {args.mask_ratio:g}")


if __name__ == "__main__":
    main()
