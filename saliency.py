r"""Stage 2: saliency, or another cue.

A cue gives numbers for each patch of a video, by which masks choose the patches to hide:

    --cue text      (default) How well does the patch fit a caption of the video?
    --cue motion    How does the patch move?

With --cue classes no video is read: CLIP embeds the names of classes, for evaluation. Use the CLIP
(--clip, --pretrained) that embedded the captions for pretraining.

Reads   a manifest, its videos, and for text the captions that caption.py wrote
        (train.captions.jsonl)
Writes  train.text.npy        [N, K, D] float16, unit length: the captions' text embeddings, the
                              contrastive loss's targets
        train.saliency.npy    [N, K, S, G, G] float16: cosine of patch and text at S moments, the
                              mid-points of S equal parts of the video. G x G covers the whole
                              frame, which is squashed to a square: a crop would leave patches of
                              the video without a value
        train.motion.npy      with --cue motion: [N, S, 2, G, G] float16: dx, dy in frame widths and
                              heights per second
        val.classes.npy       with --cue classes --data val.csv: [C, D] float16, unit length: text
                              embeddings of class names, with which linprobe.py measures
                              zero-shot accuracy
        a .json beside each array: model, its activation, flags, and hashes of the manifest's rows,
                              of the captions and of a local model's weights (for classes: their
                              names, and no hash of the rows)

    # CPU, the toy world: about 60 videos/s
    python saliency.py --data data/train.csv --clip local-dir:data/toy/clip
    # one GPU, CLIP ViT-B-16 of OpenAI
    python saliency.py --data data/train.csv
    torchrun --nproc_per_node=8 saliency.py --data data/train.csv \
        --clip ViT-L-14 --pretrained laion2b_s32b_b82k
    # no model: about as fast as decoding
    python saliency.py --data data/train.csv --cue motion
    torchrun --nproc_per_node=8 saliency.py --data data/train.csv --cue motion --flow raft
    # no videos: seconds
    python saliency.py --data data/val.csv --cue classes --classes names.txt

Text. Any open_clip model with a plain vision transformer can be used. CLIP's loss trained its class
token (only CLIPA's models average the patches); its patch tokens are a by-product, and how they are
read matters (`--dense`):

    last    The patch tokens as they leave the last block. No loss was applied to them in training.
            In the toy world most patches of the object then score lower than most of the background
            (an AUC below 0.5), though the highest patch is on the object more often than by chance.
    value   In the last block each token sees only itself: its value vector, through the output
            projection, without residual and MLP (MaskCLIP, arXiv 2112.01071).
    self    Each token gathers the values of tokens that look like it. Three ideas together:
            1. Queries attend to queries and keys to keys, not queries to keys, and the two results
               are added (SCLIP, arXiv 2312.01597).
            2. The residual and the MLP are left out (ClearCLIP, arXiv 2407.12442).
            3. The results of several blocks are added up, here of the second half, while each block
               still gets its ordinary input (CLIP Surgery, arXiv 2304.05653).

All three end with CLIP's last norm and its projection to the texts' space. The default was chosen
by measurement on the toy world, where it is known which patches the object covers. Pointing is the
share of maps whose highest patch lies on the object. AUC is the probability that a patch of the
object scores higher than a patch elsewhere. On 600 held-out videos `./demo.sh` gave

               pointing   AUC
    chance       0.16     0.50
    last         0.36     0.41
    value        0.74     0.79
    self         0.88     0.92

Motion. `--flow codec` reads the motion vectors that H.264, MPEG-4 and older codecs carry; `--flow
raft` computes optical flow, for HEVC, VP9, AV1 and MJPEG, which carry none that can be read, and as
a reference: tgm/motion.py says how. experiments/MASKS.md has the codec's error on the toy world.

Classes. Line i of the file --classes, from 0, is the name of class i; the manifest's label column,
which linprobe.py reads, holds names or these numbers. The manifest --data is read, but only its
name is used. Each --prompt, with the name in the place of {}, makes a text; a class is the mean
of its texts, of unit length again. The default, "a video of {}.", suits videos; --clip-templates
takes the 80 prompts that CLIP's authors wrote for ImageNet's photos.

Arrays are memory-mapped and pre-filled with NaN; each rank fills its own rows. Run it again after a
kill and it computes the rows that are NaN. A row that stays NaN is a video that failed or has no
caption; training leaves it out. K is the largest number of captions of any video; where one has
fewer, the rest of its row is NaN. Where rows were added at the manifest's end, `--extend` keeps the
old rows and computes the new ones (after caption.py --extend), if none of them has more captions
than K. SIGTERM and Ctrl-C finish the current batch first; the exit status is the signal's.

Shapes: N videos, K captions, S moments, G grid, C classes, D embedding, B videos of a batch,
BS = B*S frames, H W pixels, L = 1 + G*G tokens, E their width.
"""

import argparse
import os
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from tgm.arrays import (
    companion,
    ensure_array,
    file_hash,
    fill,
    filled,
    open_rows,
    read_captions,
    refuse_foreign_array,
)
from tgm.classes import make_classes
from tgm.clip import clip_settings, embed_texts, load_clip
from tgm.cues import MotionCue, Output
from tgm.flags import Parser, add_video_flags, frame_count, grid_size, pixel_count, positive
from tgm.manifest import ManifestError, read_manifest, require_files
from tgm.offline import (
    add_run_flags,
    autocast,
    batches,
    join_machine,
    leave_ranks,
    parse_run_flags,
)
from tgm.run import RunError, launch, make_folder, one_line_errors, part_of_rank, wait_for_ranks
from tgm.video import VideoReader, segment_midpoints

DENSE = ("last", "value", "self")
KINDS = {  # arrays of each cue
    "text": ("text", "saliency"),
    "motion": ("motion",),
    "classes": ("classes",),
}
PROMPT = "a video of {}."
CUES_OF_FLAG = {  # no other cue reads the flag
    "clip": ("text", "classes"),
    "pretrained": ("text", "classes"),
    "captions": ("text",),
    "dense": ("text",),
    "moments": ("text", "motion"),
    "image_size": ("text", "motion"),
    "extend": ("text", "motion"),
    "flow": ("motion",),
    "flow_weights": ("motion",),
    "grid": ("motion",),
    "window": ("motion",),
    "classes": ("classes",),
    "prompt": ("classes",),
    "clip_templates": ("classes",),
}
# Not argparse's own defaults: `parse_args` first has to see which flags were given (None: not
# given), to refuse those of another cue. Then it fills these in. The defaults of --moments and
# --image-size depend on the cue: TextCue and MotionCue have them.
DEFAULTS = {
    "clip": "ViT-B-16",
    "pretrained": "openai",
    "dense": "self",
    "flow": "codec",
    "grid": 14,
    "window": 5,
}


# ---- text: CLIP's patches against the captions ---------------------------------------------------


@torch.inference_mode()
def patch_features(visual, images, dense):
    """Unit-length patch embeddings in the space of the texts: [BS, G*G, D] float32.

    images [BS, 3, H, W], normalised
    dense: how they are read, see the top of this file"""
    # open_clip's input of the first block: patches and class token, positions, norm
    x = visual._embeds(images)  # [BS, L, E], class token first
    blocks = visual.transformer.resblocks
    if dense == "last":
        for block in blocks:
            x = block(x)
    elif dense == "value":
        for block in blocks[:-1]:
            x = block(x)
        _, _, values = project(blocks[-1], x)
        x = join_heads(blocks[-1], values)  # each token's own value
    else:  # "self"; what is gathered skips layer scale, which hardly any CLIP has
        half = len(blocks) // 2
        for block in blocks[:half]:
            x = block(x)
        x = self_path(blocks[half:], x)
    # what CLIP does with its class token: the last norm and the projection to the texts' space
    x = visual.ln_post(x[:, 1:])  # without the class token
    return F.normalize((x @ visual.proj).float(), dim=-1)


def self_path(blocks, x):
    """What tokens gather from those that look like them, summed over the blocks: x [BS, L, E] ->
    [BS, L, E]. The blocks' own input stays the ordinary one."""
    attend = F.scaled_dot_product_attention
    gathered = 0.0
    for block in blocks:
        q, k, v = project(block, x)
        gathered = gathered + join_heads(block, attend(q, q, v) + attend(k, k, v))
        if block is blocks[-1]:
            break  # no block follows that needs its ordinary output
        # x = block(x), written out: q, k and v are not computed a second time
        x = x + block.ls_1(join_heads(block, attend(q, k, v)))
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
    return gathered


def score_patches(patches, texts):
    """The saliency: how well patches [S, G*G, D] fit texts [K, D] -> [K, S, G*G]. Both are of unit
    length, so that the product is the cosine."""
    return torch.einsum("spd,kd->ksp", patches, texts)


def project(block, x):
    """Queries, keys and values of a residual block's attention: x [BS, L, E] -> three of
    [BS, heads, L, E / heads].
    """
    qkv = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
    return qkv.unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)


def join_heads(block, heads):
    """heads [BS, heads, L, E / heads] through the block's output projection -> [BS, L, E]."""
    return block.attn.out_proj(heads.transpose(1, 2).flatten(2))


def read_moments(video, moments, size, timeout):
    """Frames of a video at its moments, squashed to the size (H, W): uint8 [S, 3, H, W]."""
    with VideoReader(video.path, timeout=timeout) as reader:
        start, end = reader.span(video)
        frames = reader.read(segment_midpoints(start, end, moments), size)
    return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()


class TextCue:
    """How well every patch fits each caption of its video."""

    def __init__(self, args, videos, machine):
        self.caption_path = Path(args.captions or companion(args.data, "captions.jsonl"))
        make_captions = f"python caption.py --data {args.data}"
        if args.root:
            make_captions += f" --root {args.root}"
        if args.captions:
            make_captions += f" --out {args.captions}"
        self.captions_hash = None
        if self.caption_path.is_file():
            self.captions_hash = file_hash(self.caption_path)
        self.captions = read_captions(self.caption_path, videos, make_captions)
        if not any(self.captions):
            raise ManifestError(
                f"{self.caption_path}: no video has a caption; the reasons are in it"
            )
        self.videos = [video for video in videos if self.captions[video.row]]
        self.name = args.clip
        self.dense = args.dense
        self.moments = args.moments or 16
        self.device = machine.device
        self.autocast = autocast(machine)
        model, tokenizer = load_clip(args.clip, args.pretrained, args.image_size, machine.device)
        # every rank embeds all texts: they are few beside the frames
        texts = list(chain.from_iterable(self.captions))
        with self.autocast:
            self.embedded = embed_texts(
                model, tokenizer, texts, machine.device, quiet=machine.rank > 0
            )
        self.visual = model.visual
        self.grid = tuple(self.visual.grid_size)
        self.mean = torch.tensor(self.visual.image_mean, device=machine.device)[:, None, None]
        self.std = torch.tensor(self.visual.image_std, device=machine.device)[:, None, None]
        size = tuple(self.visual.image_size)
        self.read = partial(
            read_moments, moments=self.moments, size=size, timeout=args.video_timeout
        )

        # K, the captions of the video that has the most; the rest of a shorter row stays NaN
        count = max(len(video_captions) for video_captions in self.captions)
        dimension = len(self.embedded[texts[0]])
        settings = clip_settings(args.clip, args.pretrained, model)
        map_settings = {"dense": args.dense, "moments": self.moments, "image_size": size[0]}
        self.outputs = [
            Output("text", (count, dimension), settings),
            Output("saliency", (count, self.moments, *self.grid), settings | map_settings),
        ]
        self.summary = (
            f"{args.clip}, {len(videos) - len(self.videos)} videos without captions, "
            f"{count} captions x {self.moments} moments x {self.grid[0]} x {self.grid[1]} patches"
        )

    def rows(self, items):
        """Yields (row, [text embeddings [K, D], maps [K, S, G, G]])."""
        images = torch.cat([item.value for item in items]).to(self.device)  # [BS, 3, H, W]
        with self.autocast:
            normalised = (images / 255 - self.mean) / self.std
            patches = patch_features(self.visual, normalised, self.dense)
        patches = patches.unflatten(0, (len(items), self.moments))  # [B, S, G*G, D]
        for item, video_patches in zip(items, patches, strict=True):
            row = item.video.row
            texts = torch.stack([self.embedded[caption] for caption in self.captions[row]])
            maps = score_patches(video_patches, texts.to(self.device))  # [K, S, G*G]
            maps = maps.unflatten(-1, self.grid)
            if maps.isfinite().all() and texts.isfinite().all():
                yield row, [texts, maps]
            else:
                tqdm.write(f"{item.video.path}: {self.name} gives numbers that are not finite")


# ---- the pass over the videos --------------------------------------------------------------------


def check_places(args, videos, prefix):
    """RunError or ManifestError, before models are loaded, if no video exists, if the folder cannot
    be written to, or if a file that is none of ours would be overwritten."""
    if os.path.basename(prefix) in ("", ".", ".."):
        example = os.path.join(args.out, Path(args.data).stem)
        raise RunError(
            f"--out {args.out}: is a folder; give what the files' names begin with, such as "
            f"--out {example}"
        )
    if args.cue != "classes":
        require_files(videos, args.data)
    make_folder(Path(prefix).parent)
    for kind in KINDS[args.cue]:
        refuse_foreign_array(Path(f"{prefix}.{kind}.npy"))


def rows_made(arrays):
    """Which rows are there in all arrays of a cue, bool [N]; the others are computed. A row that a
    kill left half written is not there: `filled` looks at the number that `fill` writes last. The
    arrays may differ: a user may have deleted text.npy, which is begun again beside a full
    saliency.npy."""
    return np.logical_and.reduce([filled(array) for array in arrays])


def fill_rows(arrays, cue, items):
    """Computes the rows of a batch and writes them; prints which videos failed."""
    good = []
    for item in items:
        if item.error is None:
            good.append(item)
        else:
            tqdm.write(item.error)
    if not good:
        return
    for row, values in cue.rows(good):
        for array, value in zip(arrays, values, strict=True):
            fill(array, row, value.cpu().numpy())


# ---- the command ---------------------------------------------------------------------------------


def prompt_text(text):
    """A type for argparse: a text in which {} stands for a name."""
    if "{}" not in text:
        raise argparse.ArgumentTypeError(f"expected {{}} where the name goes, found {text!r}")
    return text


def add_classes_flags(parser):
    classes = parser.add_argument_group("--cue classes")
    classes.add_argument("--classes", metavar="FILE", help="text file: line i is class i's name")
    prompts = classes.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt",
        nargs="+",
        type=prompt_text,
        metavar="TEXT",
        help=f"texts with {{}} for the name, whose mean is taken (default: {PROMPT!r})",
    )
    prompts.add_argument(
        "--clip-templates", action="store_true", help="CLIP's 80 prompts for ImageNet"
    )


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--data", default="data/train.csv", help="the manifest")
    add_video_flags(parser)
    parser.add_argument(
        "--out",
        metavar="PREFIX",
        help="write PREFIX.saliency.npy and so on (default: beside the manifest)",
    )
    parser.add_argument(
        "--cue",
        choices=tuple(KINDS),
        default="text",
        help="text: patches against captions; motion: how patches move; classes: names embedded",
    )
    parser.add_argument(
        "--moments", type=frame_count, help="moments per video (default: 16, of motion 32)"
    )
    parser.add_argument(
        "--image-size",
        type=pixel_count,
        help="pixels for CLIP (default: the model's; more give a finer grid) or RAFT (256; a "
        "multiple of 8, at least 128)",
    )
    clip = parser.add_argument_group("--cue text and --cue classes")
    clip.add_argument(
        "--clip",
        help="open_clip model name, local-dir:FOLDER or hf-hub:NAME (default: ViT-B-16)",
    )
    clip.add_argument(
        "--pretrained",
        help="open_clip's tag of the weights, or a file of weights (default: openai); for a file "
        "give the --clip with its activation (ViT-B-16-quickgelu for OpenAI's weights)",
    )
    text = parser.add_argument_group("--cue text")
    text.add_argument(
        "--captions", help="captions to read (default: beside the manifest, train.captions.jsonl)"
    )
    text.add_argument("--dense", choices=DENSE, help="how patch features are read (default: self)")
    field = parser.add_argument_group("--cue motion")
    field.add_argument(
        "--flow", choices=("codec", "raft"), help="where motion comes from (default: codec)"
    )
    field.add_argument(
        "--flow-weights",
        metavar="FILE",
        help="RAFT-small's weights (default: torchvision's, downloaded once)",
    )
    field.add_argument(
        "--grid",
        type=grid_size,
        help="cells of the field along each side (default: 14); the grid of text's maps follows "
        "from --image-size",
    )
    field.add_argument(
        "--window",
        type=positive,
        help="frames around a moment that a codec's field averages (default: 5)",
    )
    add_classes_flags(parser)
    add_run_flags(parser, batch_size=16)
    args = parse_run_flags(parser, argv)
    for name, cues in CUES_OF_FLAG.items():
        flag = "--" + name.replace("_", "-")
        if getattr(args, name) and args.cue not in cues:
            parser.error(f"{flag} is for --cue {' and --cue '.join(cues)}")
    if args.cue == "classes" and args.classes is None:
        parser.error("--cue classes needs --classes FILE, a class name per line")
    if args.pretrained and ":" in (args.clip or ""):
        parser.error(f"--pretrained is not for --clip {args.clip}, which brings its own weights")
    if args.flow_weights and args.flow != "raft":
        parser.error("--flow-weights is for --flow raft")
    if args.window and args.flow == "raft":
        parser.error("--window is for --flow codec")
    if args.image_size and args.cue == "motion" and args.flow != "raft":
        parser.error("--image-size is for --cue text and --flow raft")
    if args.image_size and args.flow == "raft" and (args.image_size < 128 or args.image_size % 8):
        parser.error("--image-size of --flow raft: expected a multiple of 8, at least 128")
    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.clip_templates:
        import open_clip

        args.prompt = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    args.prompt = args.prompt or [PROMPT]
    return args


@one_line_errors
@torch.inference_mode()
def main(argv=None):
    args = parse_args(argv)
    videos = read_manifest(args.data, args.root)
    machine = join_machine(args.device)
    prefix = args.out or Path(args.data).with_suffix("")
    if machine.rank == 0:
        check_places(args, videos, prefix)
    if args.cue == "classes":
        if machine.rank == 0:
            path = Path(f"{prefix}.classes.npy")
            make_classes(
                path, args.classes, args.prompt, args.clip, args.pretrained, machine, args.resume
            )
        leave_ranks()
        return
    cue = TextCue(args, videos, machine) if args.cue == "text" else MotionCue(args, videos, machine)

    resume = "extend" if args.extend else args.resume
    paths = [Path(f"{prefix}.{output.kind}.npy") for output in cue.outputs]
    if machine.rank == 0:
        if cue.caption_path and file_hash(cue.caption_path) != cue.captions_hash:
            raise RunError(f"{cue.caption_path}: was made again meanwhile: run this command again")
        for path, output in zip(paths, cue.outputs, strict=True):
            ensure_array(path, videos, output.shape, output.settings, resume, cue.caption_path)
    wait_for_ranks()
    arrays = [open_rows(path) for path in paths]
    made = rows_made(arrays)
    # until every rank has read `made`: the ranks would divide different lists if one of them filled
    # rows before
    wait_for_ranks()

    todo = [video for video in cue.videos if not made[video.row]]
    mine = part_of_rank(todo, machine.rank, machine.ranks)
    if machine.rank == 0:
        print(
            f"{cue.summary}, on {machine.device}: {len(videos)} videos, {len(mine)} to do on "
            f"rank 0 of {machine.ranks}"
        )
    try:
        for items in batches(
            machine, mine, cue.read, args.batch_size, args.workers, args.max_steps
        ):
            fill_rows(arrays, cue, items)
    finally:
        for array in arrays:
            array.flush()
    wait_for_ranks()
    if machine.rank == 0:
        # opened again: on a network disk they may not show yet what other nodes wrote
        done = int(rows_made([open_rows(path) for path in paths]).sum())
        shapes = [f"{path} {list(array.shape)}" for path, array in zip(paths, arrays, strict=True)]
        print(f"{', '.join(shapes)}: {done} of {len(videos)} videos")
        if done == 0 and args.max_steps is None:
            raise RunError(f"{args.data}: none of its videos gave a row; the reasons are above")
    leave_ranks()


if __name__ == "__main__":
    launch(main)
