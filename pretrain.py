r"""Stage 3: pretraining. A video masked autoencoder whose masks follow language, motion or chance.

Reads   a manifest and its videos; train.saliency.npy for the text masks, train.motion.npy for the
        masks motion and flow; train.text.npy for the contrastive loss (with --nce-weight 0 only
        if it is there); the .json beside each array, and train.captions.jsonl, for its hash and to
        word messages
Writes  runs/MASK/, or --out: checkpoint.pt, args.json, log.jsonl (means since the last line),
        reconstruction_*.png, curves.png (where matplotlib is installed)

    # CPU, toy world, after the stages before it (demo.sh): 5 minutes
    python pretrain.py --size tiny --repeat 4 --epochs 8 --warmup-epochs 1 --blr 2.4e-2
    # one GPU, ViT-B
    python pretrain.py --mask text
    # the baseline: VideoMAE, which needs no captions
    python pretrain.py --mask tube --nce-weight 0
    # eight GPUs
    torchrun --nproc_per_node=8 pretrain.py --mask text
    # two nodes, which must share the folder --out
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
        pretrain.py --mask text

The training step is in the loop of `train`, the first function below.

Loss = reconstruction loss + nce-weight x contrastive loss. The reconstruction loss is VideoMAE's:
the mean squared error on masked cubes (with --decoder-keep on a part of them). A model that
predicts the mean of each cube has a loss of about 1.0. The contrastive loss is a symmetric InfoNCE
between the mean of the visible tokens, after a linear layer, and the CLIP embedding of a caption.
--nce-weight is 1 by default, whatever the mask. So random and tube masks need captions, too, unless
--nce-weight 0 is given.
  positives  the samples of one video, and samples with (nearly) the same caption
  negatives  all other samples of the batch, on all ranks. With --accum each part of a step is
             compared only with itself, so accumulating equals a larger batch for the
             reconstruction loss, but not for this one.
  weight 0   The contrastive loss is only monitored, if there is a text array: its head trains on
             detached features, and the encoder does not see it. (According to notes on the paper,
             which we have not read, its figure 4 was made in this way.)
If there is a text array, videos without a row in it are left out, with weight 0 as well, so that
runs of all weights train on the same videos.

Length and learning rate. One epoch is one pass over the videos. With --repeat R each decoded clip
gives R samples, each with its own crop, flip, caption and mask, so the effective epochs are
epochs x R. The learning rate follows the videos per step, not their samples, as in VideoMAE V2 and
mae_st: lr = blr x (batch-size x accum x ranks) / 256. It rises over --warmup-epochs and then falls
along a cosine towards its final value, which is the same formula with 1e-5 in place of blr. (The
toy world's small model and few steps want a --blr 160 times the default.)

Resuming. Every sample is a pure function of (seed, epoch, row, repeat). The number of workers
changes nothing, and on a CPU a resumed run repeats an uninterrupted one bit for bit. --resume auto
goes on from the checkpoint in --out, if there is one. Flags and data must be those that the run was
begun with. Only these flags may differ:
  --device (if --amp gives the same precision there), --workers, --max-steps and a few more that do
      not change the result (MAY_CHANGE, here and in tgm/resume.py, names all)
  --batch-size and the number of ranks, if their product stays the same
  --epochs, upwards. The rest of the run follows the longer cosine, so the rate jumps to its value.
Without --resume a checkpoint in --out is refused. --resume none begins again; at once it renames
the old checkpoint.pt and log.jsonl to checkpoint.old.pt and log.old.jsonl.

Signals. After SIGTERM or Ctrl-C rank 0 saves at the end of the step, all ranks end, and the exit
code is that of the signal (143 or 130). docs/robustness.md says what torchrun does then.

Shapes: B batch, R repeats, T frames, H W pixels, (t, h, w) token grid, N tokens, K captions, S
moments, G x G the grid of stored maps, E text embedding.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import default_collate

import masking
import model as models
from tgm import checkpoints, checks, flags, resume
from tgm.arrays import describe_gaps, filled
from tgm.guides import open_data
from tgm.loading import batches_from, make_clip_loader
from tgm.pictures import draw_reconstruction
from tgm.run import StopSignal, launch, one_line_errors, reason_of
from tgm.sampling import TrainingClips, clip_times, multi_scale_crop, resized_crop, seed_from
from tgm.training import Machine, Schedule, TrainingLog
from tgm.video import TIMEOUT, VideoError, VideoReader

MIN_BLR = 1e-5  # where the learning rate ends, for 256 videos per step; VideoMAE's min_lr
MAY_CHANGE = resume.MAY_CHANGE | {"picture_every"}  # flags that may differ when a run goes on


# ---- training ------------------------------------------------------------------------------------


def train(state, loader, schedule, machine, args):
    """Trains to the last step, or until a signal ends the run. state: a TrainingState; loader:
    gives batches of the samples of `Clips`."""
    model = state.model
    optimizer = state.optimizer
    scaler = state.scaler
    wrapped = machine.wrap(model)
    num_visible, num_masked, num_decoded = count_tokens(
        model.grid, args.mask_ratio, args.decoder_keep
    )
    loss_weight = args.nce_weight
    to_clip = list(model.parameters())
    if args.nce_weight == 0:
        # The contrastive loss is only watched: the model keeps its gradient from the encoder
        # (nce_detach, in make_model), so that the head can learn with weight 1. The head is not
        # clipped: clipping takes one norm over all that it is given, so that a large gradient of
        # the head would make the encoder's steps smaller.
        loss_weight = 1.0
        to_clip = [p for name, p in model.named_parameters() if not name.startswith("contrastive.")]
    largest_norm = args.clip_grad if args.clip_grad > 0 else math.inf
    min_lr = MIN_BLR * schedule.videos_per_step / 256
    clips = loader.dataset
    out = Path(args.out)
    checkpoint = out / "checkpoint.pt"
    log = TrainingLog(out, clips.videos, args.max_bad, schedule, machine, state.step)
    stop = StopSignal(machine.ranks)

    batches = batches_from(state.step, loader, schedule)
    for step in range(state.step + 1, schedule.last_step + 1):
        lr = learning_rate(step - 1, args.lr, schedule.warmup_steps, schedule.total_steps, min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses = []
        for part in range(args.accum):
            # log.fetch: next(batches), whose waiting time and failed videos are logged
            batch = flatten_repeats(log.fetch(batches), machine.device)
            mask = mask_batch(batch, args.mask, args.mask_ratio, model.grid)  # bool [B*R, N]
            chosen = None  # the decoder reconstructs all masked tokens
            if num_decoded < num_masked:
                chosen = masking.some_masked(mask, batch["noise"], num_decoded)
            with machine.accumulate(wrapped, is_last=part == args.accum - 1):
                with machine.autocast:
                    video = models.normalize(batch["clip"])  # [B*R, 3, T, H, W]
                    loss_mae, loss_nce = wrapped(
                        video,
                        mask,
                        text=batch.get("text"),
                        num_visible=num_visible,
                        decoded=chosen,
                        group=batch["row"],  # samples of one video are positives
                    )
                if loss_nce is None:  # there are no captions
                    loss_nce = torch.zeros_like(loss_mae)
                loss = loss_mae + loss_weight * loss_nce
                scaler.scale(loss / args.accum).backward()
            losses.append(torch.stack([loss_mae.detach(), loss_nce.detach()]))
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(to_clip, largest_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        model.contrastive.limit_temperature()  # from 1 / 100 to 1

        loss_mae, loss_nce = torch.stack(losses).mean(0)
        log.add(norm, loss_mae=loss_mae, loss_nce=loss_nce if "text" in batch else None)
        state.step = step
        stopped = stop.requested()
        saves = stopped or schedule.saves(step, args.save_every)
        if saves or step % args.log_every == 0:
            log.write_step(step, lr)
        if saves and machine.rank == 0:
            state.save(checkpoint, vars(args))
        draws = schedule.ends_epoch(step, every=args.picture_every)
        if stopped and step < schedule.last_step:
            draws = False  # saves time; the last step's is drawn, as no resumed run would draw it
        if draws and machine.rank == 0:
            draw(out / f"reconstruction_{step:06d}.png", model, clips, machine, args)
            log.draw(step)
        if stopped:
            machine.say(f"{stop.name}: saved {checkpoint} at step {step}; --resume auto goes on")
            machine.leave()
            stop.end()  # does not return
    machine.leave()
    stop.end_on_signal()  # if a signal came after the last `requested`, the run ends by it here


def flatten_repeats(batch, device):
    """{name: [B, R, ...]} -> {name: [B*R, ...]} on the device. "failed", which is [B], is for the
    log alone and left out."""
    return {
        name: value.to(device, non_blocking=True).flatten(0, 1)
        for name, value in batch.items()
        if value.ndim > 1
    }


def mask_batch(batch, mask_name, ratio, grid):
    """The masks of a batch of `Clips`, its repeats flattened -> bool [B*R, N] on its device, True
    where masked. mask_name: a key of masking.MASKS."""
    maps = {}
    # the stored maps are of the whole video and frame: each sample needs its times, crop and flip
    where = dict(times=batch["times"], box=batch["box"], flip=batch["flip"], grid=grid)
    if "saliency" in batch:
        maps["saliency"] = masking.cut_maps(batch["saliency"], **where)
    if "motion" in batch:
        maps["motion"] = masking.cut_motion(batch["motion"], **where, seconds=batch["seconds"])
    size = len(batch["clip"])
    return masking.make_mask(mask_name, ratio, size, grid, noise=batch["noise"], **maps)


def draw(path, model, clips, machine, args):
    """Draws a reconstruction of the first clip. Where that fails it says why: a picture is not
    worth the run."""
    try:
        first = clips[0, int(clips.rows[0])]  # (epoch, row)
        batch = flatten_repeats(default_collate([first]), machine.device)
        mask = mask_batch(batch, args.mask, args.mask_ratio, model.grid)
        draw_reconstruction(path, model, batch["clip"], mask, machine.autocast)
    except (VideoError, OSError, RuntimeError) as error:
        print(f"{path}: left out ({reason_of(error)})", file=sys.stderr)


def count_tokens(grid, ratio, keep):
    """-> the numbers of tokens that are visible, masked and reconstructed. ValueError if that is
    not possible."""
    num_masked = masking.masked_count(ratio, grid)
    num_decoded = round(keep * num_masked)
    if num_decoded == 0:
        raise ValueError(f"--decoder-keep {keep} reconstructs 0 of {num_masked} masked tokens")
    return math.prod(grid) - num_masked, num_masked, num_decoded


def learning_rate(steps_done, lr, warmup, total, floor):
    """The learning rate of the step that follows `steps_done` steps: a linear warm-up, then half a
    cosine down to `floor` (never above lr). warmup, in steps, may be a fraction."""
    if steps_done < warmup:
        return min(lr, lr * (steps_done + 1) / warmup)
    floor = min(floor, lr)
    angle = math.pi * (steps_done - warmup) / max(1, total - warmup)
    return floor + (lr - floor) * 0.5 * (1 + math.cos(angle))


def make_optimizer(model, lr, weight_decay):
    """AdamW; biases, norms, the mask token and the temperature do not decay."""
    decaying = []
    others = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or name == "mask_token":
            others.append(parameter)
        else:
            decaying.append(parameter)
    groups = [
        {"params": decaying, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


# ---- samples -------------------------------------------------------------------------------------


class Clips(TrainingClips):
    """Training samples by (epoch, row): a dict of tensors with the R repeats of a clip in front.

    grid: the model's (t, h, w); text [videos, K, E], saliency [videos, K, S, G, G] and motion
    [videos, S, 2, G, G]: mapped arrays, or None where the method does without."""

    def __init__(
        self,
        videos,
        rows,
        grid,
        frames,
        image_size,
        stride,
        repeat=1,
        flip=False,
        seed=0,
        timeout=TIMEOUT,
        text=None,
        saliency=None,
        motion=None,
    ):
        super().__init__(videos, rows, seed)
        self.grid = grid
        self.frames = frames
        self.image_size = image_size
        self.stride = stride
        self.repeat = repeat
        self.flip = flip
        self.timeout = timeout
        self.text = text
        self.saliency = saliency
        self.motion = motion

    def sample(self, epoch, row, rng):
        video = self.videos[row]
        with VideoReader(video.path, timeout=self.timeout) as reader:
            start, end = reader.span(video)
            times = clip_times(start, end, reader.fps, self.frames, self.stride, rng.random())
            frames = reader.read(times)  # uint8 [T, H, W, 3]
        frames = torch.from_numpy(frames).permute(0, 3, 1, 2)  # [T, 3, H, W]
        views = []
        for repeat in range(self.repeat):
            views.append(self.view(frames, row, seed_from(self.seed, epoch, row, repeat)))
        sample = {}
        for name in views[0]:
            sample[name] = torch.stack([view[name] for view in views])
        # the middle of each token's time, as a share of the video: [t]
        middles = (times.reshape(self.grid[0], -1).mean(1) - start) / (end - start)
        sample["times"] = torch.from_numpy(middles).float().expand(self.repeat, -1)
        sample["seconds"] = torch.full((self.repeat,), end - start, dtype=torch.float32)
        sample["row"] = torch.full((self.repeat,), row)
        return sample

    def view(self, frames, row, seed):
        """One crop, flip, caption and mask noise of a decoded clip, uint8 [T, 3, H, W]. All its
        randomness comes from `seed`."""
        height, width = frames.shape[-2:]
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed GPUs, too, which costs 0.5 ms per sample
            torch.default_generator.manual_seed(seed)
            top, left, crop_height, crop_width = multi_scale_crop(height, width)
            flip = self.flip and bool(torch.rand(()) < 0.5)
            noise = torch.rand(math.prod(self.grid))
            choice = torch.rand(()).item()
        clip = resized_crop(frames, (top, left, crop_height, crop_width), self.image_size)
        if flip:
            clip = clip.flip(-1)
        right = left + crop_width
        bottom = top + crop_height
        box = [left / width, top / height, right / width, bottom / height]
        view = {
            "clip": clip.transpose(0, 1).contiguous(),  # uint8 [3, T, image_size, image_size]
            "box": torch.tensor(box),  # x0, y0, x1, y1
            "flip": torch.tensor(flip),
            "noise": noise,  # [N]
        }
        return view | self.guides(row, choice)

    def guides(self, row, choice):
        """The arrays' part of a sample, as far as the method uses them: the embedding and the
        saliency of one caption, and the motion. choice: a random number in [0, 1), which picks
        the caption."""
        guides = {}
        caption = int(choice * self.count_captions(row))
        if self.text is not None:
            guides["text"] = torch.from_numpy(self.text[row, caption].astype(np.float32))  # [E]
        if self.saliency is not None:
            guides["saliency"] = torch.from_numpy(self.saliency[row, caption].copy())  # [S, G, G]
        if self.motion is not None:
            guides["motion"] = torch.from_numpy(self.motion[row].copy())  # [S, 2, G, G]
        for kind, values in guides.items():
            if not values.isfinite().all():
                path = self.videos[row].path
                raise VideoError(f"{path}: its {kind} has numbers that are not finite")
        return guides

    def count_captions(self, row):
        """The number of captions of a video, 0 without captions. Text and saliency hold them in the
        same order. Both have room for K captions, and NaN where a video has fewer."""
        array = self.text if self.saliency is None else self.saliency
        if array is None:
            return 0
        one_number_each = array[row].reshape(array.shape[1], -1)[:, 0]  # one per caption: [K]
        return np.count_nonzero(~np.isnan(one_number_each))


def make_clips(videos, rows, grid, arrays, args):
    """The training samples that the flags describe. arrays: as `open_data` returns them."""
    return Clips(
        videos,
        rows,
        grid,
        args.frames,
        args.image_size,
        args.stride,
        repeat=args.repeat,
        flip=args.flip,
        seed=args.seed,
        timeout=args.video_timeout,
        **arrays,
    )


# ---- the command line ----------------------------------------------------------------------------


def parse_args(argv=None):
    parser = flags.Parser(description=__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--data", default="data/train.csv", help="the manifest")
    data.add_argument(
        "--companions",
        metavar="PREFIX",
        help="read PREFIX.{saliency,motion,text}.npy, not the manifest's",
    )
    flags.add_video_flags(data)
    flags.add_clip_flags(data, repeat=1, origin="size")
    data.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="mirror half of the samples",
    )
    method = parser.add_argument_group("method")
    method.add_argument(
        "--mask",
        choices=tuple(masking.MASKS),
        default="text",
        help="what the masks follow: text and text-inverse need caption.py and saliency.py, motion "
        "and flow saliency.py --cue motion; with --nce-weight above 0 all need captions",
    )
    method.add_argument(
        "--mask-ratio", type=flags.ratio, help="share of tokens masked (default: the mask's own)"
    )
    method.add_argument(
        "--decoder-keep",
        type=flags.ratio,
        default=1.0,
        help="share of the masked tokens that are reconstructed; VideoMAE V2: 0.5",
    )
    method.add_argument(
        "--nce-weight",
        type=flags.not_negative,
        default=1.0,
        help="weight of the contrastive loss; 0 only monitors it",
    )
    method.add_argument("--size", choices=tuple(models.SIZES), default="base", help="of the model")
    method.add_argument(
        "--init", help="start from a checkpoint: ours, VideoMAE's .pth, or a Hugging Face folder"
    )
    optim = parser.add_argument_group("optimisation")
    flags.add_optimizer_flags(
        optim, batch_size=32, epochs=200, warmup_epochs=20, blr=1.5e-4, clip_grad=1.0
    )
    run = parser.add_argument_group("run")
    flags.add_training_flags(run)
    run.add_argument("--out", help="folder of the run (default: runs/MASK)")
    run.add_argument(
        "--picture-every",
        type=flags.count,
        default=10,
        help="epochs between pictures of a reconstruction and of the curves; 0 draws none",
    )
    args = parser.parse_args(argv)
    args.stage = "pretrain.py"
    args.out = args.out or f"runs/{args.mask}"
    if args.mask_ratio is None:
        args.mask_ratio = masking.RATIOS[args.mask]
    return args


# ---- the run -------------------------------------------------------------------------------------


def make_model(args, text):
    """The model of --size; text: the captions' embeddings, or None. Sets args.text_dim, and frames,
    image_size and stride where their flags were not given."""
    args.text_dim = 512 if text is None else text.shape[-1]  # without text the head is not used
    torch.manual_seed(args.seed)
    model = models.VideoMAE(
        args.size, args.frames, args.image_size, args.text_dim, nce_detach=args.nce_weight == 0
    )
    model.contrastive.requires_grad_(text is not None)
    model.set_checkpointing(args.checkpointing)
    # its config has the flags where they were given, and the size's own numbers elsewhere
    args.frames = model.config["frames"]
    args.image_size = model.config["image_size"]
    args.stride = args.stride or model.config["stride"]
    return model


def make_state(args, model, machine):
    """The model, on its device, and its optimizer, ready to train: restored from the checkpoint in
    --out if the run goes on."""
    saved = resume.find_run(Path(args.out), args.resume, vars(args), MAY_CHANGE)
    if saved is None and args.init:
        with checks.as_run_error():
            notes = checkpoints.load_pretrained(model, args.init)
        machine.say(f"weights      {args.init}: {checkpoints.summary_of(notes)}")
    optimizer = make_optimizer(model.to(machine.device), args.lr, args.weight_decay)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.amp == "fp16")
    state = resume.TrainingState(model, optimizer, scaler, step=0)
    if saved is not None:
        state.restore(saved)
    return state


def describe(args, model, arrays, state, schedule, machine):
    """What is printed before training: the derived numbers, a line each, and notes."""
    num_visible, _, num_decoded = count_tokens(model.grid, args.mask_ratio, args.decoder_keep)
    contrastive = f"weight {args.nce_weight:g}"
    if arrays["text"] is None:
        contrastive = "no text array: not computed"
    elif args.nce_weight == 0:
        contrastive = "monitored: the head trains, the encoder does not see it"
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    yield f"device       {machine.about}"
    yield (
        f"model        {args.size}, {millions:.1f} M parameters, {args.frames} frames of "
        f"{args.image_size} pixels"
    )
    yield (
        f"tokens       {num_visible} of {model.num_tokens} visible: mask {args.mask} at "
        f"{args.mask_ratio}, grid {' x '.join(map(str, model.grid))}; {num_decoded} reconstructed"
    )
    yield f"contrastive  {contrastive}"
    yield schedule.about(args.blr, MIN_BLR, state.step, state.begun_for)
    for kind, array in arrays.items():
        if array is not None and (gaps := describe_gaps(f"the {kind} array", filled(array))):
            yield f"note         {gaps}"
    steps = schedule.last_step - state.step
    if not machine.on_gpu and args.size != "tiny" and steps > 0:
        multiply_adds = sum(models.count_flops(model, num_visible, num_decoded))
        samples = schedule.samples_per_step // args.ranks
        yield checks.note_on_cpu(args.size, multiply_adds, samples, steps)


@one_line_errors
def main(argv=None):
    # args is saved with the checkpoint, so what follows from the flags is added to it: here, in
    # parse_args and in make_model
    args = parse_args(argv)
    machine = Machine(args.device, args.amp)
    args.amp = machine.amp
    args.ranks = machine.ranks
    checks.refuse_gigabytes(args.size, args.batch_size, args.repeat, args.frames, args.image_size)
    with checks.as_run_error():
        videos, rows, arrays, args.identity = open_data(
            args.data, args.mask, args.nce_weight, args.root, args.companions
        )
        model = make_model(args, arrays["text"])
        count_tokens(model.grid, args.mask_ratio, args.decoder_keep)  # refuses what is impossible
    trial = "" if machine.on_gpu or args.size == "tiny" else "--size tiny "
    checks.refuse_few(args.data, len(rows), args.batch_size, args.accum, args.ranks, trial)
    checks.refuse_missing(args.data, videos, rows, args.root, args.max_bad)
    schedule = Schedule(
        videos=len(rows),
        batch_size=args.batch_size,
        repeat=args.repeat,
        accum=args.accum,
        ranks=args.ranks,
        epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        max_steps=args.max_steps,
    )
    args.lr = args.blr * schedule.videos_per_step / 256
    args.identity["batch size x ranks"] = args.batch_size * args.ranks

    state = make_state(args, model, machine)
    # Ranks wait for one another from here on. What is wrong with flags or data has been said.
    machine.join()
    resume.refuse_unequal_ranks(state.step, vars(args))

    machine.say(f"data         {args.data}: {len(rows)} of {len(videos)} videos usable")
    for line in describe(args, model, arrays, state, schedule, machine):
        machine.say(line)
    if state.step >= schedule.last_step:
        machine.say(f"{args.out}/checkpoint.pt: already at step {state.step}, nothing left to do")
        machine.leave()
        return
    if machine.rank == 0:
        resume.take_folder(Path(args.out), args.resume, vars(args), state.step)
    clips = make_clips(videos, rows, model.grid, arrays, args)
    loader = make_clip_loader(clips, schedule, machine, args.workers)
    if args.compile:
        model.compile()  # in place: the checkpoint's keys stay as they are
    train(state, loader, schedule, machine, args)


if __name__ == "__main__":
    launch(main)
