"""The command line: a parser whose errors are one line, types for flags, and the flags that stages
share. Needs video.py, for its time limit.

    parser = Parser(description=__doc__)                    wrong flags end in one line
    parser.add_argument("--batch-size", type=positive_int)  numbers say their range
    add_video_flags(parser)                                 --root, --video-timeout
    add_machine_flags(parser)                               --device, --workers
"""

import argparse
import math
import os

from tgm.video import TIMEOUT


class HelpWithDefaults(argparse.RawDescriptionHelpFormatter):
    """Keeps the docstring's lines, and ends the help of a flag with its default, unless the help
    says it already, or it is None, empty or False."""

    def _get_help_string(self, action):
        default = action.default
        # Python 3.10's BooleanOptionalAction adds this by itself
        text = action.help.removesuffix(" (default: %(default)s)")
        if "(default" in text or default in (None, "", [], ()) or default is False:
            return text
        if default == argparse.SUPPRESS or not action.option_strings:
            return text
        if default is True:
            return f"{text} (default: on)"
        values = default if isinstance(default, (tuple, list)) else (default,)
        shown = " ".join(map(str, values)).replace("%", "%%")
        return f"{text} (default: {shown})"


class Parser(argparse.ArgumentParser):
    """argparse's parser, but its help says each default and keeps the docstring's lines, and a
    wrong flag ends in one line, not in the whole usage."""

    def __init__(self, **options):
        options.setdefault("formatter_class", HelpWithDefaults)
        super().__init__(**options)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def whole(low, high=2**31 - 1):
    """A type for argparse: whole numbers from low to high."""

    def read(text):
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {low} to {high}, found {value}")
        return value

    return read


def real(low, high=math.inf, above=False):
    """A type for argparse: finite numbers from low to high; with `above` low itself is too low."""
    expected = f"more than {low:g}" if above else f"{low:g} or more"
    if high < math.inf:
        expected += f" and at most {high:g}"

    def read(text):
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, found {text!r}") from None
        too_low = value <= low if above else value < low
        if not math.isfinite(value) or too_low or value > high:
            raise argparse.ArgumentTypeError(f"expected a finite number, {expected}, found {text}")
        return value

    return read


positive_int = whole(1)
count = whole(0)  # 0 or more
seed_number = whole(0, 2**32 - 1)
worker_count = whole(0, 1024)
frame_count = whole(1, 10_000)
grid_size = whole(1, 1024)
pixel_count = whole(1, 8192)
positive = real(0, above=True)
not_negative = real(0)
fraction = real(0, 1)  # both ends included
ratio = real(0, 1, above=True)  # 0 left out


def device_name(text):
    """A type for argparse: auto, cpu, cuda or cuda:N."""
    number = text.removeprefix("cuda:")
    if text in ("auto", "cpu", "cuda") or (text.startswith("cuda:") and number.isdecimal()):
        return text
    raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda or cuda:N, found {text!r}")


# ---- flags of several stages ---------------------------------------------------------------------


def add_video_flags(group):
    """--root and --video-timeout, for stages that decode the videos of a manifest."""
    group.add_argument(
        "--root", help="folder that relative paths start from (default: the manifest's)"
    )
    group.add_argument(
        "--video-timeout",
        type=positive,
        default=TIMEOUT,
        metavar="S",
        help="seconds after which a video is given up",
    )


def add_machine_flags(group, workers=2):
    """--device and --workers. workers: the default number of decoding processes per rank."""
    group.add_argument(
        "--device", type=device_name, default="auto", help="auto, cpu, cuda or cuda:N"
    )
    group.add_argument(
        "--workers",
        type=worker_count,
        default=workers,
        help="decoding processes per rank; 0 decodes in the run itself",
    )


# ---- flags of training ---------------------------------------------------------------------------


def add_clip_flags(group, repeat: int, origin: str):
    """The flags of training clips. repeat: the default of --repeat; origin: where the defaults of
    --frames, --stride and --image-size come from, for the help."""
    group.add_argument(
        "--frames", type=frame_count, help=f"frames of a clip (default: the {origin}'s)"
    )
    group.add_argument(
        "--stride",
        type=positive_int,
        help=f"use every Nth frame of the video (default: the {origin}'s)",
    )
    group.add_argument(
        "--image-size", type=pixel_count, help=f"pixels of a side (default: the {origin}'s)"
    )
    group.add_argument(
        "--repeat",
        type=whole(1, 1024),
        default=repeat,
        help="samples of each decoded clip: raise it where decoding is too slow for the GPU",
    )
    group.add_argument(
        "--max-bad",
        type=fraction,
        default=0.05,
        help="stop when more than this share of the training videos cannot be read, or when "
        "more than this share of the files of any manifest is missing (of many files 256 are "
        "looked for, and the share must be clearly exceeded)",
    )


def add_augmentation_flags(group):
    """The flags of a classifier's augmentation (tgm/augment.py), and of label smoothing. The
    defaults are VideoMAE's."""
    group.add_argument(
        "--crop-scale",
        type=ratio,
        nargs=2,
        default=(0.08, 1.0),
        metavar=("MIN", "MAX"),
        help="a crop's share of the frame's area",
    )
    group.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="mirror half of the samples; give --no-flip where direction is the label",
    )
    group.add_argument(
        "--rand-augment",
        type=whole(0, 30),
        nargs=2,
        default=(4, 21),
        metavar=("OPS", "M"),
        help="number of operations (0: off), and their magnitude from 0 to 30",
    )
    group.add_argument("--erase", type=fraction, default=0.25, help="probability of random erasing")
    group.add_argument("--mixup", type=not_negative, default=0.8, help="alpha of mixup; 0: off")
    group.add_argument("--cutmix", type=not_negative, default=1.0, help="alpha of cutmix; 0: off")
    group.add_argument("--smoothing", type=fraction, default=0.1, help="label smoothing")


def add_optimizer_flags(
    group, batch_size: int, epochs: int, warmup_epochs: float, blr: float, clip_grad: float
):
    """The flags of the optimizer and its schedule, with these defaults."""
    group.add_argument(
        "--batch-size",
        type=positive_int,
        default=batch_size,
        help="videos per rank and batch, before --repeat",
    )
    group.add_argument(
        "--accum",
        type=positive_int,
        default=1,
        help="batches per step, whose gradients are averaged: raise it if you have fewer GPUs",
    )
    group.add_argument("--epochs", type=positive_int, default=epochs, help="passes over the videos")
    group.add_argument(
        "--warmup-epochs",
        type=not_negative,
        default=warmup_epochs,
        help="epochs in which the learning rate rises",
    )
    group.add_argument(
        "--blr",
        type=positive,
        default=blr,
        help="learning rate for 256 videos per step, repeats not counted",
    )
    group.add_argument("--weight-decay", type=not_negative, default=0.05, help="of AdamW")
    group.add_argument(
        "--clip-grad",
        type=not_negative,
        default=clip_grad,
        help="largest gradient norm; 0 does not clip",
    )


def add_training_flags(group):
    """The flags of a training run: the seed, and how it runs."""
    add_machine_flags(group, workers=min(8, os.cpu_count()))
    group.add_argument(
        "--seed",
        type=seed_number,
        default=0,
        help="of all that is random, such as samples, their order and new weights",
    )
    group.add_argument(
        "--amp",
        choices=("auto", "bf16", "fp16", "off"),
        default="auto",
        help="precision; auto: bf16 on a GPU that has it, else fp16; off on a CPU",
    )
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="torch.compile the model: minutes at the start, faster steps on a GPU",
    )
    group.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="recompute activations in the backward pass: less memory, slower steps",
    )
    group.add_argument(
        "--max-steps",
        type=positive_int,
        help="end at this step, counted from the run's beginning, for a trial",
    )
    group.add_argument(
        "--resume",
        choices=("auto", "none"),
        help="auto: go on from the checkpoint in --out, if any; none: begin again (default: refuse "
        "if there is one)",
    )
    group.add_argument(
        "--save-every",
        type=count,
        default=0,
        metavar="STEPS",
        help="also save a checkpoint every so many steps; each epoch's end saves one anyway",
    )
    group.add_argument("--log-every", type=positive_int, default=10, help="steps between log lines")
