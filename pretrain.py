"""Stage 3: pretraining. A video masked autoencoder whose masks follow language, motion or chance; optionally with captions.

Reads   a manifest and its videos; train.saliency.npy for the text masks, train.motion.npy for the masks motion and flow;
        train.text.npy for the contrastive loss
Writes  runs/NAME/: checkpoint.pt, args.json, log.jsonl (a line a logged step), reconstruction_*.png

    python pretrain.py --size tiny --repeat 4 --epochs 8 --warmup-epochs 1 --blr 2e-3     CPU, the toy world: 5 minutes
    python pretrain.py --mask text                                                        one GPU, ViT-B
    torchrun --nproc_per_node=8 pretrain.py --mask text                                   eight GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 pretrain.py --mask text

The loss is VideoMAE's mean squared error on masked cubes (about 1.0 for the trivial prediction) plus --nce-weight times a
symmetric InfoNCE between the mean visible token and the caption. With weight 0 the contrastive loss is only monitored: its
head trains on detached features and the encoder is untouched (the paper's figure 4).

One epoch is one pass over the videos. With --repeat R each decoded clip gives R samples (its own crop, flip, caption and mask
each), so the effective epochs are epochs x R and the effective batch is batch-size x R x accum x ranks, by which the learning
rate is scaled: lr = blr x effective batch / 256. Every sample is a pure function of (seed, epoch, row, repeat): the number of
workers changes nothing, and a resumed run repeats an uninterrupted one bit for bit on a CPU. SIGTERM and Ctrl-C save and exit 0.

Letters: B batch, R repeats, T frames, H W pixels, (t, h, w) token grid, N tokens, K captions, S moments, D text embedding.
"""
import argparse
import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import save_image

import masking
import model as models
from clips import EpochBatches, TrainingClips, clip_times, multi_scale_crop, repeat_seed
from manifest import ManifestError, companion, file_hash, filled, hold, open_array, read_manifest
from tgm.run import (
    Parser,
    StopSignal,
    choose_device,
    count,
    device_name,
    fraction,
    frame_count,
    ignore_signals,
    join_ranks,
    keep_log,
    launch,
    make_folder,
    not_negative,
    one_line_errors,
    patient,
    pixel_count,
    positive,
    positive_int,
    ratio,
    refuse_changes,
    seed_number,
    torchrun_ranks,
    worker_count,
)
from video import TIMEOUT, VideoError, VideoReader

# ---- samples -------------------------------------------------------------------------------------------------------------


class Clips(TrainingClips):
    """Training samples by (epoch, row). `text` [N, K, D], `saliency` [N, K, S, G, G] and `motion` [N, S, 2, G, G] are mapped
    arrays or None."""

    def __init__(self, videos, rows, args, grid, text=None, saliency=None, motion=None):
        super().__init__(videos, rows, args.seed)
        self.args, self.grid, self.text, self.saliency, self.motion = args, grid, text, saliency, motion

    def sample(self, epoch, row, rng):
        args, video = self.args, self.videos[row]
        with VideoReader(video.path, timeout=args.video_timeout) as reader:
            start, end = reader.span(video)
            times = clip_times(start, end, reader.fps, args.frames, args.stride, rng.random())
            frames = reader.read(times)                                                      # uint8 [T, H, W, 3]
        frames = torch.from_numpy(frames).permute(0, 3, 1, 2)                                # [T, 3, H, W]
        middles = torch.from_numpy((times.reshape(self.grid[0], -1).mean(1) - start) / (end - start)).float()
        repeats = [self.view(frames, row, repeat_seed(args.seed, epoch, row, repeat)) for repeat in range(args.repeat)]
        stacked = {key: torch.stack([view[key] for view in repeats]) for key in repeats[0]}
        seconds = torch.full((args.repeat,), end - start, dtype=torch.float32)
        return stacked | {"times": middles.expand(args.repeat, -1), "seconds": seconds, "row": row}

    def view(self, frames, row, seed):
        """One crop, flip, caption and mask noise of a decoded clip; all randomness from `seed`."""
        args, (height, width) = self.args, frames.shape[-2:]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed also asks for accelerators: 0.5 ms where there are none
            if args.crop == "resized":
                top, left, h, w = v2.RandomResizedCrop.get_params(frames, scale=tuple(args.crop_scale), ratio=(3 / 4, 4 / 3))
            else:
                top, left, h, w = multi_scale_crop(height, width)
            flip = args.flip and bool(torch.rand(()) < 0.5)
            noise, choice = torch.rand(math.prod(self.grid)), torch.rand(()).item()
        clip = TF.resized_crop(frames, top, left, h, w, [args.image_size, args.image_size], antialias=True)
        clip = clip.flip(-1) if flip else clip
        view = {"clip": clip.transpose(0, 1).contiguous(),                                   # uint8 [3, T, H, W]
                "box": torch.tensor([left / width, top / height, (left + w) / width, (top + h) / height]),
                "flip": torch.tensor(flip), "noise": noise}
        maps = self.saliency if self.saliency is not None else self.text
        if maps is not None:
            captions = 1 if maps is None else int((~np.isnan(maps[row].reshape(len(maps[row]), -1)[:, 0])).sum())
            caption = int(choice * captions)
        if self.text is not None:
            view["text"] = torch.from_numpy(self.text[row, caption].astype(np.float32))
        if self.saliency is not None:
            view["saliency"] = torch.from_numpy(self.saliency[row, caption].copy())          # float16 [S, G, G]
        if self.motion is not None:
            view["motion"] = torch.from_numpy(self.motion[row].copy())                       # float16 [S, 2, G, G]
        for kind in ("saliency", "motion"):
            if kind in view and not view[kind].isfinite().all():
                raise VideoError(f"{self.videos[row].path}: its {kind} has numbers that are not finite")
        return view


# ---- the run -------------------------------------------------------------------------------------------------------------


def learning_rate(step, lr, warmup, total, floor=1e-5):
    """Linear warm-up, then half a cosine down to `floor` (never above lr): a pure function of the step."""
    if step < warmup:
        return lr * (step + 1) / warmup
    floor = min(floor, lr)
    return floor + (lr - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def make_optimizer(model, args):
    """AdamW; biases, norms, the mask token and the temperature do not decay."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    still = lambda name, p: p.ndim < 2 or name == "mask_token"
    groups = [{"params": [p for name, p in named if not still(name, p)], "weight_decay": args.weight_decay},
              {"params": [p for name, p in named if still(name, p)], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


@torch.no_grad()
def draw_reconstruction(path, model, dataset, args, device, autocast):
    """Three rows for one clip: as it is, masked, reconstructed (masked cubes keep their true mean and deviation)."""
    batch = torch.utils.data.default_collate([dataset[0, int(dataset.rows[0])]])
    batch = {key: value.flatten(0, 1).to(device) for key, value in batch.items() if value.ndim > 1}
    clip, mask = models.normalize(batch["clip"]), mask_batch(batch, model, args)
    with autocast:
        made = model.reconstruct(clip, mask)
    c = model.config
    cubes = mask[:, :, None].expand(-1, -1, 3 * c["tubelet"] * c["patch"] ** 2).float()
    hidden = models.unpatchify(cubes, model.grid, c["tubelet"], c["patch"])
    true = batch["clip"] / 255
    rows = [x[0].transpose(0, 1)[:: c["tubelet"]] for x in (true, torch.where(hidden > 0, torch.full_like(true, 0.5), true), made)]
    picture = torch.nn.functional.interpolate(torch.cat(rows), scale_factor=max(1, 128 // true.shape[-1]))
    save_image(picture, path, nrow=len(rows[0]), padding=4, pad_value=1.0)


def mask_batch(batch, model, args):
    """The masks of a batch on its device: bool [B, N]."""
    maps, place = {}, (batch["times"], batch["box"], batch["flip"], model.grid)
    if "saliency" in batch:
        maps["saliency"] = masking.cut_maps(batch["saliency"], *place)
    if "motion" in batch:
        maps["motion"] = masking.cut_motion(batch["motion"], *place, batch["seconds"])
    return masking.make_mask(args.mask, args.mask_ratio, len(batch["clip"]), model.grid, noise=batch["noise"], **maps)


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--data", default="data/train.csv", help="the manifest")
    data.add_argument("--root", help="folder that relative paths start from (default: the manifest's)")
    data.add_argument("--strict-root", action="store_true", help="refuse a manifest whose paths lead out of that folder")
    data.add_argument("--companions", metavar="PREFIX", help="read PREFIX.{saliency,motion,text}.npy, not the manifest's")
    data.add_argument("--frames", type=frame_count, help="frames of a clip (default: the size's)")
    data.add_argument("--stride", type=positive_int, help="video frames a clip frame (default: 4, tiny 2; SSv2 wants 2)")
    data.add_argument("--image-size", type=pixel_count, help="pixels (default: the size's)")
    data.add_argument("--crop", choices=("multiscale", "resized"), default="multiscale", help="VideoMAE's, or random resized")
    data.add_argument("--crop-scale", type=ratio, nargs=2, default=(0.5, 1.0), metavar=("MIN", "MAX"), help="a resized crop's area")
    data.add_argument("--flip", action=argparse.BooleanOptionalAction, default=False, help="mirror half of the samples")
    data.add_argument("--repeat", type=positive_int, default=1, help="samples of each decoded clip")
    data.add_argument("--video-timeout", type=not_negative, default=TIMEOUT, metavar="S", help="seconds after which a video is given up")
    data.add_argument("--max-bad", type=fraction, default=0.05, help="stop when more than this share of the videos cannot be read")
    method = parser.add_argument_group("method")
    method.add_argument("--mask", choices=tuple(masking.MASKS), default="text")
    method.add_argument("--mask-ratio", type=ratio, help="share of tokens masked (default: the mask's own)")
    method.add_argument("--decoder-keep", type=ratio, default=1.0, help="share of the masked tokens that are reconstructed; VideoMAE V2: 0.5")
    method.add_argument("--nce-weight", type=not_negative, default=1.0, help="weight of the contrastive loss; 0 only monitors it")
    method.add_argument("--size", choices=tuple(models.SIZES), default="base")
    method.add_argument("--init", help="start from a checkpoint: ours, VideoMAE's .pth, or a Hugging Face folder")
    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--batch-size", type=positive_int, default=32, help="videos a rank and step, before --repeat")
    optim.add_argument("--accum", type=positive_int, default=1, help="batches whose gradients are added up in a step")
    optim.add_argument("--epochs", type=positive_int, default=200)
    optim.add_argument("--warmup-epochs", type=not_negative, default=20)
    optim.add_argument("--blr", type=positive, default=1.5e-4, help="learning rate for an effective batch of 256")
    optim.add_argument("--weight-decay", type=not_negative, default=0.05)
    optim.add_argument("--clip-grad", type=not_negative, default=1.0, help="largest gradient norm; 0 does not clip")
    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, help="folder of the run (default: runs/MASK)")
    run.add_argument("--seed", type=seed_number, default=0)
    run.add_argument("--device", type=device_name, default="auto", help="auto, cpu, cuda")
    run.add_argument("--workers", type=worker_count, default=min(8, os.cpu_count()), help="decoding processes a rank; 0 decodes in line")
    run.add_argument("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="auto: off on a CPU")
    run.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the model")
    run.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=False, help="recompute activations")
    run.add_argument("--max-steps", type=positive_int, help="stop after this many steps, for a trial")
    run.add_argument("--resume", choices=("auto", "none"), help="auto: go on from the run's checkpoint, if any; none: start anew")
    run.add_argument("--save-every", type=count, default=0, help="checkpoint after every so many steps, beside the end of each epoch")
    run.add_argument("--log-every", type=positive_int, default=10, help="steps between log lines")
    run.add_argument("--picture-every", type=count, default=10, help="epochs between reconstruction pictures; 0 draws none")
    args = parser.parse_args(argv)
    args.mask_ratio = masking.RATIOS[args.mask] if args.mask_ratio is None else args.mask_ratio
    args.out = Path(args.out or f"runs/{args.mask}")
    return args


def open_data(args):
    """The manifest and what the method needs beside it: videos, rows to train on, {"text", "saliency", "motion": array or None}."""
    videos = read_manifest(args.data, args.root, strict_root=args.strict_root)
    remedy = f"python caption.py {args.data} && python saliency.py {args.data}"
    prefix = args.companions or Path(args.data).with_suffix("")
    captions = companion(args.data, "captions.jsonl")  # if they were remade, the arrays are stale
    expect = {"captions": file_hash(captions)} if captions.exists() and not args.companions else {}
    arrays = {"text": None, "saliency": None, "motion": None}
    if args.mask.startswith("text"):
        arrays["saliency"], _ = open_array(f"{prefix}.saliency.npy", videos, remedy, **expect)
    if args.mask in ("motion", "flow"):
        arrays["motion"], _ = open_array(f"{prefix}.motion.npy", videos, f"python saliency.py {args.data} --cue motion")
    if args.nce_weight > 0 or Path(f"{prefix}.text.npy").exists():
        arrays["text"], _ = open_array(f"{prefix}.text.npy", videos, remedy, **expect)
    usable = np.ones(len(videos), bool)
    for array in arrays.values():
        usable &= True if array is None else filled(array)
    return videos, np.flatnonzero(usable), arrays


@one_line_errors
def main(argv=None):
    args = parse_args(argv)
    rank, ranks, local = torchrun_ranks()
    say = print if rank == 0 else lambda *_, **__: None
    device, why = choose_device(args.device, local)
    use_cuda = device.type == "cuda"
    if use_cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    amp = args.amp if args.amp != "auto" else "off" if not use_cuda else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]
    autocast = torch.autocast(device.type, dtype, enabled=amp != "off")

    try:
        videos, rows, arrays = open_data(args)
        text = arrays["text"]
        args.text_dim = text.shape[-1] if text is not None else 512
        torch.manual_seed(args.seed)
        model = models.VideoMAE(args.size, args.frames, args.image_size, args.text_dim, nce_detach=args.nce_weight == 0)
        masked = masking.masked_count(args.mask_ratio, model.grid)
        visible, decoded = model.num_tokens - masked, round(args.decoder_keep * masked)
        if not 0 < decoded <= masked:
            raise ValueError(f"--decoder-keep {args.decoder_keep} reconstructs {decoded} of {masked} masked tokens")
    except (ManifestError, ValueError) as error:
        sys.exit(str(error) + ("" if Path(args.data).exists() else " (the toy world: python data/toy.py)"))
    args.frames, args.image_size, grid = model.config["frames"], model.config["image_size"], model.grid
    args.stride = args.stride or model.config["stride"]
    model.contrastive.requires_grad_(text is not None)
    model.set_checkpointing(args.checkpointing)
    steps_per_epoch = len(rows) // (args.batch_size * ranks * args.accum)
    if steps_per_epoch == 0:
        sys.exit(f"{args.data}: {len(rows)} usable videos do not fill one step of {args.batch_size} videos x {args.accum} "
                 f"accumulated x {ranks} ranks: lower --batch-size or --accum")
    total_steps = args.epochs * steps_per_epoch
    last_step = min(total_steps, args.max_steps or total_steps)
    effective = args.batch_size * args.repeat * args.accum * ranks
    args.lr = args.blr * effective / 256
    checkpoint_path, log_path = args.out / "checkpoint.pt", args.out / "log.jsonl"
    if checkpoint_path.exists() and args.resume is None:
        sys.exit(f"{checkpoint_path} is there already: --resume auto goes on from it, --resume none starts anew")

    step = 0
    optimizer = make_optimizer(model.to(device), args)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    try:
        if args.resume == "auto" and checkpoint_path.exists():
            models.load_pretrained(model, checkpoint_path)
            saved = torch.load(checkpoint_path, map_location=device, weights_only=True)
            optimizer.load_state_dict(saved["optimizer"])
            scaler.load_state_dict(saved["scaler"])
            step = saved["step"]
        elif args.init:
            say(f"from {args.init}:", *(models.load_pretrained(model, args.init) or ["every key"]), sep="\n  ")
    except ValueError as error:
        sys.exit(str(error))

    monitored = "monitored: the head trains, the encoder does not see it"
    contrastive = "no text array: not computed" if text is None else f"weight {args.nce_weight:g}" if args.nce_weight else monitored
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    say(f"""data         {args.data}: {len(rows)} of {len(videos)} videos usable
steps        {total_steps} = {args.epochs} epochs x {steps_per_epoch}, from step {step}
device       {device} ({why}), amp {amp}, {ranks} ranks
model        {args.size}, {millions:.1f} M parameters, {args.frames} frames of {args.image_size} pixels
tokens       {visible} of {math.prod(grid)} visible: mask {args.mask} at {args.mask_ratio}, grid {" x ".join(map(str, grid))}; {decoded} reconstructed
contrastive  {contrastive}
batch        {effective} = {args.batch_size} videos x {args.repeat} repeats x {args.accum} accumulated x {ranks} ranks
lr           {args.lr:.3g} = {args.blr:g} x {effective} / 256; {args.epochs} epochs, {args.epochs * args.repeat} effective""")
    if step >= last_step:
        say(f"{checkpoint_path}: already at step {step}, nothing left to do")
        return
    args.out = str(args.out)  # a checkpoint holds plain types alone
    if rank == 0:
        make_folder(log_path.parent)
        hold(checkpoint_path)
        log_path.with_name("args.json").write_text(json.dumps(vars(args), indent=1) + "\n")
        keep_log(log_path, step)

    batches = EpochBatches(rows, args.batch_size, steps_per_epoch * args.accum, args.seed, rank, ranks)
    loader = DataLoader(Clips(videos, rows, args, grid, **arrays), batch_sampler=batches, num_workers=args.workers,
                        pin_memory=use_cuda, persistent_workers=args.workers > 0, worker_init_fn=ignore_signals)
    if args.compile:
        model.compile()  # in place: the checkpoint's keys stay as they are
    wrapped = model
    if ranks > 1:
        join_ranks("nccl" if use_cuda else "gloo")
        wrapped = DistributedDataParallel(model, device_ids=[local] if use_cuda else None)
    stop = StopSignal(ranks)

    # A head that only monitors has no part in the norm: through it, it would touch the encoder.
    clipped = [p for name, p in model.named_parameters() if args.nce_weight > 0 or not name.startswith("contrastive.")]
    window, used, failed = [], [], set()  # since the last log line: losses on the device, rows; in the whole run: bad rows
    began, data_time = time.time(), 0.0
    while step < last_step:
        epoch = step // steps_per_epoch
        batches.epoch, batches.start = epoch, step % steps_per_epoch * args.accum
        iterator = patient(loader)
        for step in range(step + 1, min(last_step, (epoch + 1) * steps_per_epoch) + 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step - 1, args.lr, args.warmup_epochs * steps_per_epoch, total_steps)
            losses = []
            for micro in range(args.accum):
                waited = time.time()
                batch = next(iterator)
                data_time += time.time() - waited
                failed.update(row for row in batch["failed"].tolist() if row >= 0)
                used.append((step, batch["row"].tolist()))
                batch = {key: value.to(device, non_blocking=True).flatten(0, 1) for key, value in batch.items() if value.ndim > 1}
                mask = mask_batch(batch, model, args)                                        # bool [B*R, N]
                chosen = masking.some_masked(mask, batch["noise"], decoded) if decoded < masked else None
                last = micro == args.accum - 1
                with contextlib.nullcontext() if last or ranks == 1 else wrapped.no_sync():
                    with autocast:
                        loss_mae, loss_nce = wrapped(models.normalize(batch["clip"]), mask, batch.get("text"), visible, chosen)
                    loss_nce = torch.zeros_like(loss_mae) if loss_nce is None else loss_nce
                    scaler.scale((loss_mae + (args.nce_weight or 1.0) * loss_nce) / args.accum).backward()
                losses.append(torch.stack([loss_mae.detach(), loss_nce.detach()]))
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(clipped, args.clip_grad or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            window.append(torch.cat([torch.stack(losses).mean(0), norm[None]]))

            ends, stops = step == last_step or step % steps_per_epoch == 0, stop.agreed()
            saves = ends or stops or (args.save_every and step % args.save_every == 0)
            if not (saves or step % args.log_every == 0):
                continue
            stats = torch.stack(window)                                                      # [steps, 3]
            broken = ~stats[:, :2 if scaler.is_enabled() else 3].isfinite().all(1)           # fp16's scaler skips infinite gradients
            if broken.any():  # the one place where the CPU waits for the GPU
                bad_step = step - len(window) + 1 + int(broken.int().argmax())
                names = [videos[row].name for at, batch_rows in used if at == bad_step for row in batch_rows]
                sys.exit(f"step {bad_step}: the loss or its gradient is not finite; the last checkpoint is kept. Its batch: {', '.join(names)}")
            stats = torch.cat([stats.mean(0), torch.tensor([float(len(failed))], device=device)])
            if ranks > 1:
                dist.all_reduce(stats)
            stats = stats.cpu()
            if len(failed) > args.max_bad * len(rows):
                sys.exit(f"{len(failed)} of {len(rows)} videos cannot be read, more than --max-bad {args.max_bad}: "
                         + ", ".join(videos[row].name for row in sorted(failed)[:20]))
            seconds = (time.time() - began) / len(window)
            entry = {"step": step, "epoch": round(step / steps_per_epoch, 3), "loss_mae": stats[0].item() / ranks,
                     "loss_nce": stats[1].item() / ranks if text is not None else None, "lr": optimizer.param_groups[0]["lr"],
                     "grad_norm": stats[2].item() / ranks, "data_ms": 1000 * data_time / len(window), "step_ms": 1000 * seconds,
                     "clips_per_s": effective / seconds, "left_s": (last_step - step) * seconds, "skipped": int(stats[3])}
            say("  ".join(f"{key} {value:.4g}" for key, value in entry.items() if value is not None), flush=True)
            if rank == 0:
                with open(log_path, "a") as file:
                    file.write(json.dumps(entry) + "\n")
            if rank == 0 and saves:
                models.save_checkpoint(checkpoint_path, model=model.state_dict(), optimizer=optimizer.state_dict(),
                                       scaler=scaler.state_dict(), step=step, args=vars(args))
            draws = args.picture_every and (step == last_step or step % (steps_per_epoch * args.picture_every) == 0)
            if rank == 0 and ends and draws:
                path = log_path.with_name(f"reconstruction_{step:06d}.png")
                draw_reconstruction(path, model, loader.dataset, args, device, autocast)
            if stops:
                say(f"{stop.name or 'a signal to another rank'}: saved {checkpoint_path} at step {step}; --resume auto goes on")
                step = last_step
                break
            window, used, began, data_time = [], [], time.time(), 0.0
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    launch(main)
