"""Stage 2: saliency. CLIP scores every patch of every video against each of its captions, once; or:
how does every patch move?

Reads   a manifest, its videos, and for text the captions that caption.py wrote
        (train.captions.jsonl)
Writes  train.text.npy        [N, K, D] float16, unit length: the captions' text embeddings, the
                              contrastive loss's targets
        train.saliency.npy    [N, K, S, G, G] float16: cosine of patch and text at S moments, the
                              mid-points of S equal parts of the video, G x G over the whole frame,
                              squashed to a square
        train.motion.npy      with --cue motion: [N, S, 2, G, G] float16: dx, dy in frame widths and
                              heights per second
        a .json beside each array: model, its activation, flags, and hashes of the manifest's rows
                              and of the captions

    # CPU, the toy world: about 60 videos/s
    python saliency.py --data data/train.csv --clip local-dir:data/toy/clip
    # one GPU, CLIP ViT-B-16 of OpenAI
    python saliency.py --data data/train.csv
    torchrun --nproc_per_node=8 saliency.py --data data/train.csv --clip ViT-L-14 --pretrained laion2b_s32b_b82k
    # no model: about as fast as decoding
    python saliency.py --data data/train.csv --cue motion
    torchrun --nproc_per_node=8 saliency.py --data data/train.csv --cue motion --flow raft

Text. Any open_clip model with a plain vision transformer serves. The image feature CLIP was trained
for is its class token; what its patch tokens say is a by-product, and how they are read matters
(`--dense`):

    last    the patch tokens as they leave the last block. They were trained for nothing, and match
            the *background* better than the object: the class token gathers what it needs, and
            patches keep what it does not.
    value   in the last block each patch sees only itself: its value vector, through the output
            projection, without residual and MLP (MaskCLIP, arXiv 2112.01071)
    self    each patch gathers the values of patches that look like it: query-query plus key-key
            attention in the place of query-key (SCLIP, arXiv 2312.01597), without residual and MLP,
            summed over the second half of the blocks, whose own input stays the ordinary one (CLIP
            Surgery, arXiv 2304.05653)

The default is `self`, chosen by measurement on the toy world, whose objects are known: on its 600
held-out videos `./demo.sh` gave pointing accuracy and AUC of 0.26, 0.27 for `last`, 0.59, 0.62 for
`value` and 0.94, 0.89 for `self` (chance: 0.22, 0.50).

Motion. `--flow codec` reads the motion vectors that H.264, MPEG-4 and older codecs carry; `--flow
raft` computes optical flow, for HEVC, VP9, AV1 and MJPEG, which carry none that can be read, and as
a reference: tgm/motion.py says how. experiments/MASKS.md has the codec's error on the toy world.

Arrays are memory-mapped and pre-filled with NaN; each rank fills its own rows. Run it again after a
kill and it computes the rows that are NaN. A row that stays NaN is a video that failed or has no
caption; training leaves it out. Where rows were added at the manifest's end, `--extend` keeps those
that there are (after caption.py --extend). SIGTERM and Ctrl-C end it by that signal after the batch
in hand.
Letters: N videos, K captions, S moments, G grid, D embedding, B batch, L = 1 + G*G tokens, W width.
"""

import contextlib
import datetime
import difflib
import math
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

from tgm import motion
from tgm.arrays import (
    companion,
    create_or_resume,
    file_hash,
    fill,
    filled,
    open_rows,
    read_captions,
    refuse_foreign_array,
)
from tgm.flags import (
    Parser,
    add_machine_flags,
    add_video_flags,
    frame_count,
    grid_size,
    pixel_count,
    positive,
    positive_int,
)
from tgm.loading import make_loader, patient
from tgm.manifest import ManifestError, read_manifest, require_files
from tgm.run import (
    RunError,
    StopSignal,
    choose_device,
    join_ranks,
    launch,
    make_folder,
    one_line_errors,
    part_of_rank,
    quiet_libraries,
    reason_of,
    torchrun_ranks,
    wait_for_ranks,
)
from tgm.video import VideoError, VideoReader, segment_midpoints

DENSE = ("last", "value", "self")
NOT_PLAIN = (
    "patch maps need an open_clip model whose image tower is a plain vision transformer, without "
    "attentional pooling"
)


class Moments(Dataset):
    """Item i is (row, read(video), None), or (row, None, why it failed)."""

    def __init__(self, videos, read):
        self.videos, self.read = videos, read

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, index):
        video = self.videos[index]
        try:
            return video.row, self.read(video), None
        except VideoError as error:
            return video.row, None, str(error)


def read_moments(video, moments, size, timeout):
    """uint8 [S, 3, H, W], squashed to the size (H, W)."""
    with VideoReader(video.path, timeout=timeout) as reader:
        frames = reader.read(segment_midpoints(*reader.span(video), moments), size)
    return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()


def read_codec_field(video, moments, window, grid, timeout):
    """float32 [S, 2, G, G]: the motion field from the codec's vectors in a window of frames
    around each moment.
    """
    with VideoReader(video.path, vectors=True, timeout=timeout) as reader:
        start, end = reader.span(video)
        middles, window = segment_midpoints(start, end, moments), window / reader.fps
        times = np.arange(math.ceil(start * reader.fps), math.ceil(end * reader.fps)) / reader.fps
        near = abs(times[:, None] - middles).min(1) <= window / 2 if len(times) else []
        frames = reader.read_vectors(times[near] if np.any(near) else middles)
    return torch.from_numpy(motion.codec_field(frames, middles, window, grid))


def read_pairs(video, moments, size, timeout):
    """uint8 [S, 2, 3, H, W]: two frames around each moment, for optical flow; and the seconds
    between them, float32 [S].
    """
    with VideoReader(video.path, timeout=timeout) as reader:
        start, end = reader.span(video)
        times, apart = motion.pair_times(
            segment_midpoints(start, end, moments), start, end, reader.fps
        )
        frames = reader.read(times.ravel(), (size, size))
    frames = torch.from_numpy(frames).permute(0, 3, 1, 2).unflatten(0, (moments, 2)).contiguous()
    return frames, torch.full((moments,), apart, dtype=torch.float32)


def load_clip(name, pretrained, image_size, device):
    """An open_clip model with its published weights, in evaluation mode, and its tokenizer.

    name: one of open_clip's, or local-dir:FOLDER or hf-hub:NAME, which bring their own weights
    pretrained: open_clip's tag of the weights, or a file
    image_size: pixels, None for the model's own; others interpolate the position table

    The activation is the one that the weights were trained with. RunError where open_clip's tables
    contradict each other about it, where the image tower is not a plain vision transformer, and
    where weights are missing: open_clip would warn at most, and draw them at random.
    """
    import open_clip

    flags = f"--clip {name}"
    tag = {}
    if ":" in name:
        pretrained = None  # not for these
    else:
        name = name.replace("/", "-")  # as create_model does, but get_tokenizer does not
        flags += f" --pretrained {pretrained}"
        tag = open_clip.get_pretrained_cfg(name, pretrained or "")
    try:
        with quiet_libraries():
            config = open_clip.get_model_config(name)
            check_configuration(name, pretrained, config, tag, flags)
            model = open_clip.create_model(
                name,
                pretrained=pretrained,
                force_quick_gelu=tag.get("quick_gelu", False),
                require_pretrained=True,
                device=device,
            )
            tokenizer = open_clip.get_tokenizer(name)
    except (RunError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # missing or damaged files, no network, other weights, anything
        raise RunError(
            f"{flags}: cannot load it: {reason_of(error)} (for the toy world: "
            "--clip local-dir:data/toy/clip)"
        ) from None
    kinds = {type(block) for block in model.visual.transformer.resblocks}
    if kinds != {open_clip.transformer.ResidualAttentionBlock}:
        raise RunError(f"{flags}: {NOT_PLAIN}")
    if image_size is not None:
        change_image_size(model, image_size)
    return model.eval(), tokenizer


def check_configuration(name, pretrained, config, tag, flags):
    """RunError for what can be told before weights are downloaded.

    config: open_clip's for the model, None if there is none
    tag: its entry for the weights, empty if there is none
    """
    import open_clip

    if config is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), cutoff=0.4)
        raise RunError(
            f"{flags}: cannot load it: no such model in open_clip; near to it are "
            f"{', '.join(near) or 'none'}"
        )
    vision = config["vision_cfg"]
    convolutional = isinstance(vision.get("layers"), list)
    if vision.get("timm_model_name") or convolutional or vision.get("attentional_pool"):
        raise RunError(f"{flags}: {NOT_PLAIN}")
    if ":" not in name and not tag and not Path(pretrained or "").is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        raise RunError(
            f"{flags}: neither a file nor one of open_clip's tags for this model: "
            f"{tags or 'it has none'}"
        )
    if tag and config.get("quick_gelu") and not tag.get("quick_gelu"):
        hub = tag["hf_hub"].strip("/")
        raise RunError(
            f"{flags}: open_clip's configuration has QuickGELU, its table of weights GELU; "
            f"--clip hf-hub:{hub} takes the configuration published with the weights"
        )


def change_image_size(model, pixels):
    """Gives a plain vision transformer square images of another size, as open_clip does while it
    loads weights: by interpolating the position table. But in float32, whatever the weights' file
    holds: float16 has no such interpolation on a CPU."""
    import open_clip

    visual = model.visual
    patch = visual.patch_size[0]
    if pixels % patch:
        raise RunError(
            f"--image-size {pixels}: expected a multiple of the model's patch size, {patch}"
        )
    visual.image_size = (pixels, pixels)
    visual.grid_size = (pixels // patch, pixels // patch)
    table = visual.positional_embedding.detach()
    state = {"visual.positional_embedding": table.cpu()}
    open_clip.model.resize_pos_embed(state, model)
    table = state["visual.positional_embedding"].to(table.device)
    visual.positional_embedding = torch.nn.Parameter(table, requires_grad=False)


def activation_of(model):
    """The activation of a plain vision transformer of open_clip, "QuickGELU" or "GELU"."""
    return type(model.visual.transformer.resblocks[0].mlp.gelu).__name__


def project(block, x):
    """Queries, keys and values of a residual block's attention: x [B, L, W] -> three of [B,
    heads, L, W / heads].
    """
    qkv = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
    return qkv.unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)


def join_heads(block, heads):
    """[B, heads, L, W / heads] through the block's output projection: [B, L, W]."""
    return block.attn.out_proj(heads.transpose(1, 2).flatten(2))


def patch_features(visual, images, dense):
    """Unit-length patch embeddings in the space of the texts: images [B, 3, H, W] normalised ->
    [B, G*G, D] float32.
    """
    x, path = visual._embeds(images), 0.0  # [B, L, W], class token first
    blocks, attend = visual.transformer.resblocks, F.scaled_dot_product_attention
    for index, block in enumerate(blocks):
        last = index == len(blocks) - 1
        if dense == "self" and index >= len(blocks) // 2:
            q, k, v = project(block, x)
            path = path + join_heads(block, attend(q, q, v) + attend(k, k, v))
            if not last:  # the block itself, written out: its projections are computed once for all
                x = x + block.ls_1(join_heads(block, attend(q, k, v)))
                x = x + block.ls_2(block.mlp(block.ln_2(x)))
        elif dense == "value" and last:  # each token's own value
            path = join_heads(block, project(block, x)[2])
        elif dense == "last" or not last:
            x = block(x)
    x = visual.ln_post((x if dense == "last" else path)[:, 1:])
    return F.normalize((x @ visual.proj).float(), dim=-1)


def embed_texts(model, tokenizer, texts, device, batch=256):
    """Unit-length embeddings of distinct texts: {text: float32 [D]}. Too long a text is cut by
    the tokenizer.
    """
    texts = sorted(set(texts))
    embedded = {}
    quiet = torchrun_ranks()[0] > 0
    for start in tqdm(range(0, len(texts), batch), "texts", unit="batch", delay=5, disable=quiet):
        part = texts[start : start + batch]
        features = model.encode_text(tokenizer(part).to(device)).float()
        features = F.normalize(
            features, dim=-1
        ).cpu()  # in float32: under bf16 autocast lengths would be off by 0.25 %
        embedded.update(zip(part, features))
    return embedded


# ---- the two cues --------------------------------------------------------------------------------
# Each opens its arrays with create(kind, shape, about) and returns: the array whose rows are NaN
# until done, the videos that have a row to fill, read(video) for the loader's workers, write(good)
# for a batch [(row, what was read), ...], a line that describes it.


def text_cue(args, videos, device, autocast, create):
    caption_path = args.captions or companion(args.data, "captions.jsonl")
    captions = read_captions(caption_path, videos, f"python caption.py --data {args.data}")
    if not any(captions):
        raise ManifestError(f"{caption_path}: no video has a caption; the reasons are in it")
    model, tokenizer = load_clip(args.clip, args.pretrained, args.image_size, device)
    visual = model.visual
    grid, size, moments = tuple(visual.grid_size), tuple(visual.image_size), args.moments or 16
    mean, std = (
        torch.tensor(value, device=device)[:, None, None]
        for value in (visual.image_mean, visual.image_std)
    )
    texts = max(len(of_video) for of_video in captions)
    with autocast:
        embedded = embed_texts(
            model, tokenizer, [text for of_video in captions for text in of_video], device
        )
    width = len(next(iter(embedded.values())))

    about = {
        "captions": partial(file_hash, caption_path),
        "clip": args.clip,
        "pretrained": None if ":" in args.clip else args.pretrained,
        "activation": activation_of(model),
    }
    text_array = create("text", (texts, width), about)
    about |= {"dense": args.dense, "moments": moments, "image_size": size[0]}
    array = create("saliency", (texts, moments, *grid), about)

    def write(good):
        images = torch.cat([frames for _, frames in good]).to(device)  # [B*S, 3, H, W]
        with autocast:
            patches = patch_features(visual, (images / 255 - mean) / std, args.dense)
        for (row, _), of_video in zip(
            good, patches.unflatten(0, (len(good), moments))
        ):  # [S, G*G, D]
            text = torch.stack([embedded[text] for text in captions[row]])  # [K, D]
            maps = torch.einsum("spd,kd->ksp", of_video, text.to(device)).unflatten(-1, grid)
            if not (maps.isfinite().all() and text.isfinite().all()):
                tqdm.write(f"{videos[row].path}: {args.clip} gives numbers that are not finite")
                continue
            fill(text_array, row, text.numpy())
            fill(array, row, maps.cpu().numpy())

    says = (
        f"{args.clip}, {sum(not of_video for of_video in captions)} videos without captions, {texts} captions x "
        f"{moments} moments x {grid[0]} x {grid[1]} patches"
    )
    return (
        array,
        [video for video in videos if captions[video.row]],
        partial(read_moments, moments=moments, size=size, timeout=args.video_timeout),
        write,
        says,
    )


def motion_cue(args, videos, device, autocast, create):
    moments, flow, size = args.moments or 32, args.flow or "codec", args.image_size or 256
    about = {"flow": flow, "moments": moments, "grid": args.grid}
    if flow == "raft":
        model = motion.load_raft(args.flow_weights, device)
        weights = args.flow_weights and file_hash(args.flow_weights)
        about |= {"weights": weights, "image_size": size}
        read = partial(read_pairs, moments=moments, size=size, timeout=args.video_timeout)
    else:
        about |= {"window": args.window}
        read = partial(
            read_codec_field,
            moments=moments,
            window=args.window,
            grid=args.grid,
            timeout=args.video_timeout,
        )
    array = create("motion", (moments, 2, args.grid, args.grid), about)

    def write(good):
        for row, field in good:
            if flow == "raft":
                pairs, seconds = field
                field = motion.raft_field(
                    model, pairs.to(device), seconds.to(device), args.grid
                ).cpu()
            fill(array, row, field.numpy())

    says = f"motion by {flow}, {moments} moments x {args.grid} x {args.grid}"
    return array, videos, read, write, says


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
        "--cue", choices=("text", "motion"), default="text", help="what the maps show"
    )
    parser.add_argument(
        "--moments", type=frame_count, help="moments of a video (default: 16, of motion 32)"
    )
    parser.add_argument(
        "--image-size",
        type=pixel_count,
        help="pixels for CLIP (default: the model's; more give a finer grid) or RAFT (256)",
    )
    text = parser.add_argument_group("--cue text")
    text.add_argument(
        "--captions", help="captions to read (default: beside the manifest, train.captions.jsonl)"
    )
    text.add_argument(
        "--clip", default="ViT-B-16", help="open_clip model name, local-dir:FOLDER or hf-hub:NAME"
    )
    text.add_argument(
        "--pretrained",
        default="openai",
        help="open_clip's tag of the weights, or a file, for which the name of --clip says the "
        "activation (ViT-B-16-quickgelu for OpenAI's own)",
    )
    text.add_argument("--dense", choices=DENSE, default="self", help="how patch features are read")
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
        "--grid", type=grid_size, default=14, help="cells of the field along each side"
    )
    field.add_argument(
        "--window",
        type=positive,
        default=5,
        help="frames around a moment that a codec's field averages",
    )
    run = parser.add_argument_group("run")
    add_machine_flags(run)
    run.add_argument("--batch-size", type=positive_int, default=16, help="videos a batch")
    run.add_argument(
        "--max-steps", type=positive_int, help="stop after this many batches, for a trial"
    )
    run.add_argument("--resume", choices=("auto", "none"), default="auto", help="none: start anew")
    run.add_argument(
        "--extend", action="store_true", help="rows were added at the manifest's end: compute those"
    )
    args = parser.parse_args(argv)
    if args.cue == "text" and (args.flow or args.flow_weights):
        parser.error("--flow and --flow-weights are for --cue motion")
    if args.flow_weights and args.flow != "raft":
        parser.error("--flow-weights is for --flow raft")
    if args.extend and args.resume == "none":
        parser.error("--extend keeps what --resume none throws away")
    return args


@one_line_errors
@torch.inference_mode()
def main(argv=None):
    args = parse_args(argv)
    rank, ranks, local = torchrun_ranks()
    device, _ = choose_device(args.device, local)
    autocast = (
        contextlib.nullcontext()
        if device.type == "cpu"
        else torch.autocast(
            "cuda", torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        )
    )
    if ranks > 1:
        # ranks only wait for one another, at the start and at the end of work of very different
        # length
        join_ranks("gloo", timeout=datetime.timedelta(days=7))

    prefix, written = args.out or Path(args.data).with_suffix(""), {}

    def create(kind, shape, about):
        path = Path(f"{prefix}.{kind}.npy")
        resume = "extend" if args.extend else args.resume
        written[path] = create_or_resume(path, videos, shape, about, resume, rank, wait_for_ranks)
        return written[path]

    try:
        videos = read_manifest(args.data, args.root)
        if rank == 0:
            check_places(args, videos, prefix)
        cue = text_cue if args.cue == "text" else motion_cue
        array, able, read, write, says = cue(args, videos, device, autocast, create)
    except ManifestError as error:
        sys.exit(
            str(error)
            + ("" if Path(args.data).exists() else " (the toy world: python data/toy.py)")
        )

    there = filled(array)
    # until all have read: the rows that one of them fills would change the others' parts
    wait_for_ranks()
    todo = part_of_rank([video for video in able if not there[video.row]], rank, ranks)
    if rank == 0:
        print(f"{says}, on {device}: {len(videos)} videos, {len(todo)} to do on rank 0 of {ranks}")
    stop = StopSignal(then="ending after this batch")
    loader = make_loader(Moments(todo, read), args.batch_size, args.workers)
    with tqdm(total=len(todo), unit="video", disable=rank > 0) as bar:
        for step, items in enumerate(patient(loader), 1):
            for error in (error for _, _, error in items if error):
                tqdm.write(error)
            if good := [(row, was_read) for row, was_read, error in items if error is None]:
                write(good)
            bar.update(len(items))
            if step == args.max_steps or stop.name:
                break
    for memory in written.values():
        memory.flush()
    if stop.name:  # every rank that is told ends for itself: its rows are on the disk
        print(f"{stop.name}: stopped; the same command goes on", file=sys.stderr)
        stop.end()
    stop.at_once()
    wait_for_ranks()
    if rank == 0:
        path = next(path for path, memory in written.items() if memory is array)
        # opened again: on a network disk it may not show yet what other nodes wrote
        done = int(filled(open_rows(path)).sum())
        print(
            *(f"{path} {list(memory.shape)}" for path, memory in written.items()),
            sep=", ",
            end=f": {done} of {len(videos)} videos\n",
        )
        if done == 0 and args.max_steps is None:
            raise RunError(f"{args.data}: none of its videos could be read; the reasons are above")
    if ranks > 1:
        dist.destroy_process_group()


def check_places(args, videos, prefix):
    """Before models are loaded: RunError or ManifestError where no video is there, nothing can be
    written, or files to write are there that are not ours."""
    if os.path.basename(prefix) in ("", ".", ".."):
        example = os.path.join(args.out, Path(args.data).stem)
        raise RunError(
            f"--out {args.out}: is a folder; give what the files' names begin with, such as --out {example}"
        )
    require_files(videos, args.data)
    make_folder(Path(prefix).parent)
    for kind in ("text", "saliency") if args.cue == "text" else ("motion",):
        refuse_foreign_array(Path(f"{prefix}.{kind}.npy"))


if __name__ == "__main__":
    launch(main)
