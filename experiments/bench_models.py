"""The sections of experiments/bench.py that run models: step, overhead, saliency, paper.

A section is a function of the flags and a temporary folder; it returns rows of tables. Models are
full-size with random weights, which are as slow as trained ones.
"""

import json
from functools import partial

import open_clip
import peers
import torch
import torch.nn.functional as F
from measure import DEVICE, ON_GPU, compare, pairs
from peers import GRID

import masking
import model as models
import pretrain
import saliency
from tgm import checkpoints


def random_batch(batch):
    """What the loader gives for `batch` samples, of random pixels, maps and texts."""
    torch.manual_seed(0)
    corner = torch.rand(batch, 2) * 0.3
    data = {
        "clip": torch.randint(0, 256, (batch, 3, 16, 224, 224), dtype=torch.uint8),
        "noise": torch.rand(batch, 1568),
        "times": ((torch.arange(8) + 0.5) / 8).expand(batch, 8),
        "box": torch.cat([corner, corner + 0.7], 1),
        "flip": torch.rand(batch) < 0.5,
        "text": F.normalize(torch.randn(batch, 512), dim=-1),
        "seconds": torch.full((batch,), 10.0),
        "saliency": torch.rand(batch, 16, 14, 14).half(),
        "motion": torch.randn(batch, 32, 2, 14, 14).half() / 10,
    }
    return {name: value.to(DEVICE) for name, value in data.items()}


def without(data, *names):
    return {name: value for name, value in data.items() if name not in names}


def autocast(enabled):
    return torch.autocast(DEVICE, torch.bfloat16, enabled=enabled)


# ---- a training step -----------------------------------------------------------------------------


def train_step(model, loss, dtype):
    """A function that does a forward pass, a backward pass and a step of pretrain.py's AdamW, and
    returns the loss. loss(): the forward pass."""
    optimizer = pretrain.make_optimizer(model, lr=1e-4, weight_decay=0.05)

    def step(_=0):  # `pairs` gives the number of the pair
        with autocast(dtype == "bf16"):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


def masked_video(ratio, batch):
    """-> (normalised video [B, 3, T, H, W], its tube masks [B, N], their noise [B, N])."""
    data = random_batch(batch)
    mask = masking.make_mask("tube", ratio, batch, GRID, noise=data["noise"])
    return models.normalize(data["clip"]), mask, data["noise"]


def our_step(ratio, dtype, folder, batch, keep=1.0):
    """A step of ViT-B from the weights in `folder`. keep: as --decoder-keep."""
    video, mask, noise = masked_video(ratio, batch)
    model = models.VideoMAE("base").to(DEVICE)
    checkpoints.load_pretrained(model, folder)
    model.contrastive.requires_grad_(False)
    num_visible, num_masked, num_decoded = pretrain.count_tokens(GRID, ratio, keep)
    chosen = None
    if num_decoded < num_masked:
        chosen = masking.some_masked(mask, noise, num_decoded)

    def loss():
        return model(video, mask, num_visible=num_visible, decoded=chosen).loss_mae

    return train_step(model, loss, dtype)


def their_step(ratio, dtype, folder, batch):
    """The same step of transformers' VideoMAE."""
    video, mask, _ = masked_video(ratio, batch)
    video = video.transpose(1, 2).contiguous()
    model = peers.transformers_mae(folder).to(DEVICE).train()

    def loss():
        return model(video, bool_masked_pos=mask).loss

    return train_step(model, loss, dtype)


def step(args, temporary):
    """Our step against transformers', on the same weights, clips and masks."""
    folder = temporary / "base"
    checkpoints.save_huggingface(models.VideoMAE("base"), folder)
    rows = []
    for ratio, bound, bound_half in ((0.9, 1.05, 1.5), (0.6, 1.0, None)):
        for dtype in ("float32", "bf16"):
            settings = (ratio, dtype, folder, args.batch)
            check_losses(settings)
            work = f"a step of ViT-B, mask {ratio}, {dtype}"
            peer = "transformers, sdpa"
            theirs = their_step(*settings)
            seconds = pairs(our_step(*settings), theirs, args.steps)
            rows.append(compare(work, peer, seconds, args.batch, "at least", bound))
            seconds = pairs(our_step(*settings, keep=0.5), theirs, args.steps)
            work += ", --decoder-keep 0.5"
            aim = "" if bound_half is None else "at least"
            rows.append(compare(work, peer, seconds, args.batch, aim, bound_half))
    return rows


def check_losses(settings):
    """Both sides compute the same."""
    ours = our_step(*settings)().item()
    theirs = their_step(*settings)().item()
    tolerance = 1e-2 if "bf16" in settings else 1e-4
    assert abs(theirs / ours - 1) < tolerance, (ours, theirs)


# ---- what the method adds to a step --------------------------------------------------------------


def method_step(mask, ratio, batch):
    """What costs time in a step of pretrain.py on a batch that is there: its masks, normalising,
    forward, backward, AdamW; not clipping. The text mask comes with the contrastive loss."""
    data = without(random_batch(batch), "motion")
    if mask != "text":
        data = without(data, "saliency", "text")
    model = models.VideoMAE("base").to(DEVICE)
    model.contrastive.requires_grad_(mask == "text")
    num_visible = model.num_tokens - masking.masked_count(ratio, GRID)

    def loss():
        masks = pretrain.mask_batch(data, mask, ratio, GRID)
        video = models.normalize(data["clip"])
        mae, nce = model(video, masks, data.get("text"), num_visible)
        return mae if nce is None else mae + nce

    return train_step(model, loss, "bf16" if ON_GPU else "float32")


def random_clip():
    """CLIP as saliency.py runs it by default, with OpenAI's activation, but with random weights."""
    model = open_clip.create_model(
        "ViT-B-16", pretrained=None, force_quick_gelu=True, device=DEVICE
    )
    return model.eval()


def overhead(args, temporary):
    """The text mask and the contrastive loss in a step; the masks alone."""
    tube = method_step("tube", 0.9, args.batch)
    text = method_step("text", 0.9, args.batch)
    clip = random_clip()
    frames = torch.randn(args.batch * 16, 3, 224, 224, device=DEVICE)

    def online(i):
        with torch.inference_mode(), autocast(ON_GPU):
            saliency.patch_features(clip.visual, frames, "self")
        text(i)

    peer = "tube mask at as many tokens"
    work = "a step with text mask and contrastive loss"
    seconds = pairs(text, tube, 2 * args.steps)
    rows = [compare(work, peer, seconds, args.batch, "at most", 1.02)]
    seconds = pairs(online, tube, args.steps)
    work = "were CLIP run in it, on its 16 frames"
    rows.append(compare(work, peer, seconds, args.batch, "at most"))

    steps = 32 / args.batch
    peer = f"{steps:g} x a step of {args.batch}, tube 0.9"
    data = random_batch(32)
    for mask, ratio in masking.RATIOS.items():
        unused = {"saliency", "motion"} - {masking.NEEDS[mask]}
        draw = partial(draw_masks, without(data, *unused), mask, ratio)
        seconds = pairs(draw, tube, args.steps)
        seconds[1] *= steps
        work = f"masks {mask} {ratio} of 32 clips"
        rows.append(compare(work, peer, seconds, aim="at most", bound=0.02))
    return rows


def draw_masks(data, mask, ratio, _):
    pretrain.mask_batch(data, mask, ratio, GRID)


# ---- saliency ------------------------------------------------------------------------------------


@torch.inference_mode()
def clip_maps(args, temporary):
    """saliency.py's work on frames that are there: maps of 3 captions per video."""
    videos, moments = (16, 16) if ON_GPU else (2, 8)
    clip = random_clip()
    frames = torch.randn(videos * moments, 3, 224, 224, device=DEVICE)
    text = F.normalize(torch.randn(videos, 3, clip.visual.output_dim, device=DEVICE), dim=-1)

    def ours(dense, _):
        with autocast(ON_GPU):
            patches = saliency.patch_features(clip.visual, frames, dense)
        return torch.einsum("vspd,vkd->vksp", patches.unflatten(0, (videos, moments)), text)

    def one_video_a_batch(_):
        with autocast(ON_GPU):
            return [clip.encode_image(part) for part in frames.chunk(videos)]

    def bare_tower(_):
        with autocast(ON_GPU):
            return clip.encode_image(frames)

    rows = []
    for dense in saliency.DENSE:
        work = f"CLIP's maps of {videos} x {moments} frames, --dense {dense}, per frame"
        for peer, theirs, aim, bound in (
            ("encode_image, one video a batch", one_video_a_batch, "at least", 1.2),
            ("the bare image tower", bare_tower, "at most", 1.05),
        ):
            if dense != "self":  # the aims are for the default
                aim, bound = "at most", None
            seconds = pairs(partial(ours, dense), theirs, args.steps)
            rows.append(compare(work, peer, seconds, len(frames), aim, bound))
    return rows


# ---- on paper ------------------------------------------------------------------------------------

FLOPS = 312e12 * 0.4  # of an A100 in bf16, of which training is assumed to get 40 %
# videos and GPUs
PLANS = {"K400, 8 GPUs": (240_000, 8), "100 x K400, 64 GPUs": (24_000_000, 64)}
# column: section of bench.json and the end of its row's name
CORES = {
    "cores a GPU": ("sample", "uint8, short side any"),
    "cores, --repeat 4": ("sample", "per sample, short side any"),
    "cores, re-encoded": ("reencode", "short side any"),
}


def paper(args, temporary):
    """Disk and FLOPs are exact. Hours are not measured: they follow from FLOPS. CPU cores come from
    the sections sample and reencode of bench.json."""
    results = {}
    if args.out.exists():
        results = json.loads(args.out.read_text())
    rows = []
    for name, (videos, _) in PLANS.items():
        rows.append(
            {
                "disk": name,
                "train.text.npy, GB": videos * 3 * 512 * 2 / 1e9,
                "train.saliency.npy, GB": videos * 3 * 16 * 14**2 * 2 / 1e9,
                "train.motion.npy, GB": videos * 32 * 2 * 14**2 * 2 / 1e9,
            }
        )
    with torch.device("meta"):
        model = models.VideoMAE("base")
    for name, (videos, gpus) in PLANS.items():
        for mask, ratio, keep in (
            ("tube 0.9", 0.9, 1.0),
            ("text 0.6", 0.6, 1.0),
            ("text 0.6, --decoder-keep 0.5", 0.6, 0.5),
        ):
            num_visible, _, num_decoded = pretrain.count_tokens(GRID, ratio, keep)
            # a step is three forward passes, a multiply-add two FLOPs
            flops = 3 * 2 * sum(models.count_flops(model, num_visible, num_decoded))
            clips_per_second = FLOPS / flops  # of one GPU
            hours = videos / gpus / clips_per_second / 3600  # of an epoch
            row = {
                "pretraining": name,
                "mask": mask,
                "PFLOP an epoch": videos * flops / 1e15,
                "h, 200 epochs": 200 * hours,
                "h, 800": 800 * hours,
                "clips/s a GPU": clips_per_second,
            }
            for column, (section, ending) in CORES.items():
                ms = milliseconds(results, section, ending)
                row[column] = f"run {section}" if ms is None else clips_per_second * ms / 1000
            rows.append(row)
    return rows


def milliseconds(results, section, ending):
    """Our time in the first row of a section whose work ends so; None if there is none."""
    rows = results.get(section, {"rows": []})["rows"]
    for row in rows:
        if row.get("work", "").endswith(ending):
            return row["ms"]
    return None
