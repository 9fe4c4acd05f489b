"""Wrong values of every flag that takes a number, and wrong paths, in every stage: each ends in one
line, or the stage does its work.

Flags are found in the stages' own parsers, so that a new one is tried as well. Work is kept small:
four videos, one step."""

import argparse
import contextlib
import importlib
import io
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
from conftest import BLIP, CLIP, run

from tgm import arrays
from tgm.flags import Parser

SHORT = ("--workers", 0, "--batch-size", 2, "--max-steps", 1)
TINY = ("--size", "tiny", *SHORT, "--epochs", 1, "--resume", "none", "--out", "out/run")
STAGES = {
    "caption": (
        "caption",
        "--data",
        "data/four.csv",
        "--model",
        BLIP,
        *SHORT,
        "--resume",
        "none",
        "--out",
        "out/four.captions.jsonl",
    ),
    "saliency": (
        "saliency",
        "--data",
        "data/four.csv",
        "--clip",
        CLIP,
        "--moments",
        2,
        *SHORT,
        "--resume",
        "none",
        "--out",
        "out/four",
    ),
    "classes": (
        "saliency",
        *"--data data/four.csv --cue classes --classes data/names.txt".split(),
        "--clip",
        CLIP,
        *SHORT,
        "--resume",
        "none",
        "--out",
        "out/four",
    ),
    "motion": (
        "saliency",
        *"--data data/four.csv --cue motion --moments 2".split(),
        *SHORT,
        "--resume",
        "none",
        "--out",
        "out/four",
    ),
    "masking": (
        "tgm.preview",
        *("--data data/four.csv --frames 8 --image-size 32 --patch-size 8 --out mask.png").split(),
    ),
    "pretrain": (
        "pretrain",
        "--data",
        "data/four.csv",
        *TINY,
        "--warmup-epochs",
        0,
        "--picture-every",
        0,
    ),
    "finetune": (
        "finetune",
        "--data",
        "data/four.csv",
        "--val",
        "data/four.csv",
        *TINY,
        *"--warmup-epochs 0 --views 1 1".split(),
    ),
    "linprobe": (
        "linprobe",
        *(
            "--data data/four.csv --test data/four.csv --checkpoint none "
            "--size tiny --workers 0 --clips 1 --epochs 1 --seeds 1 --k 1 "
            "--out out/probe"
        ).split(),
    ),
    "video": ("tgm.prepare", "data/four.csv", "--workers", 1),
    "toy": ("toy", "--train", 1, "--val", 1, "--workers", 1, "--out", "out/toy"),
}
VALUES = ("0", "-1", "1000000000", "1e9", "nan", "x")
REFUSED = ("-1", "nan", "x")  # by every flag's type
MEMORY = 2 * 2**30  # bytes beyond what the tests' own process has
SECONDS = 10  # of computing
LONG = (  # what the user asks for and may have, though it never ends: tried as far as the parser
    ("linprobe", "--seeds", "1000000000"),
    ("linprobe", "--epochs", "1000000000"),
    ("toy", "--train", "1000000000"),
    ("toy", "--val", "1000000000"),
)


@pytest.fixture(scope="module")
def four(world, tmp_path_factory):
    """A folder with data/four.csv, four videos, and all that hangs off them."""
    folder = tmp_path_factory.mktemp("four")
    (folder / "data").mkdir()
    (folder / "data/videos").symlink_to(world / "data/videos")
    lines = (world / "data/train.csv").read_text().splitlines()
    (folder / "data/four.csv").write_text("\n".join(lines[:5]) + "\n")
    (folder / "data/names.txt").write_text("circle\nring\n")
    run("caption.py", "--data", "data/four.csv", "--model", BLIP, "--workers", 0, cwd=folder)
    run(
        "saliency.py",
        "--data",
        "data/four.csv",
        "--clip",
        CLIP,
        "--moments",
        2,
        "--workers",
        0,
        cwd=folder,
    )
    run(
        "saliency.py",
        *"--data data/four.csv --cue motion --moments 2 --grid 4 --workers 0".split(),
        cwd=folder,
    )
    return folder


class Endless(BaseException):
    """More than SECONDS of computing: raised in whatever was at work."""


def give_up(*_):
    raise Endless


@pytest.fixture(autouse=True)
def limits(four):
    """A value may ask for more memory or time than there is; it must not get it from the machine
    that runs the tests. And one case finds nothing that another wrote."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    handler = signal.signal(signal.SIGVTALRM, give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, handler)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    shutil.rmtree(four / "out", ignore_errors=True)


# captions without a model: most of the other flags are refused beside --labels
LABELS = ("caption", "--data", "data/four.csv", "--labels", "--resume", "none")


def outcome(stage, folder, *more, replace=None):
    """Runs a stage's main() in the folder: -> the one line it ended with, or None if it did its
    work. A traceback fails the test.
    replace: the manifest, where it is no flag."""
    module, *flags = (STAGES | {"labels": LABELS})[stage]
    flags[0] = replace or flags[0]
    before = os.getcwd()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    errors = io.StringIO()
    try:
        os.chdir(folder)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            importlib.import_module(module).main([str(flag) for flag in (*flags, *more)])
        return None
    except SystemExit as stop:
        if stop.code in (None, 0):
            return None
        line = errors.getvalue().strip() if stop.code == 2 else stop.code
        assert isinstance(line, str) and line and "\n" not in line, line
        return line
    finally:
        os.chdir(before)
        arrays.release()
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Found(Exception):
    """Carries a stage's parser out of its parse_args."""


def parser_of(stage):
    """The parser that a stage's parse_args makes."""

    def hand_out(parser, argv=None, namespace=None):
        raise Found(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", hand_out)
        try:
            importlib.import_module(STAGES[stage][0]).parse_args([])
        except Found as found:
            return found.args[0]


def number_flags(stage):
    """[(flag, how many values it takes)] of the flags whose type turns "1" into a number."""
    found = []
    for action in parser_of(stage)._actions:
        try:
            number = action.type is not None and isinstance(action.type("1"), (int, float))
        except (ValueError, argparse.ArgumentTypeError):
            number = False
        assert (
            number
            or not isinstance(action.default, (int, float))
            or isinstance(action.default, bool)
            or action.nargs == 0
        )
        if number:
            found.append(
                (action.option_strings[0], action.nargs if isinstance(action.nargs, int) else 1)
            )
    return found


CASES = [(stage, flag, values) for stage in STAGES for flag, values in number_flags(stage)]


def test_help_says_each_default():
    parser = Parser(prog="x.py")
    parser.add_argument("--open", help="first")
    parser.add_argument("--off", action="store_true", help="second")
    parser.add_argument("--said", default=3, help="third (default: all)")
    parser.add_argument("--zero", default=0, help="fourth")
    parser.add_argument("--pair", nargs=2, default=(5, 3), help="fifth, 5 %% of it")
    parser.add_argument("--rows", nargs="+", default=[0, 2], help="of a list")
    parser.add_argument("--none", nargs="*", default=[], help="of an empty list")
    parser.add_argument("--percent", default="50 %", help="sixth")
    parser.add_argument("--on", action=argparse.BooleanOptionalAction, default=True, help="last")
    parser.add_argument("files", nargs="*", default=[], help="files")
    words = " ".join(parser.format_help().split())
    assert words.endswith(
        "files files options: -h, --help show this help message and exit "
        "--open OPEN first --off second --said SAID third (default: all) "
        "--zero ZERO fourth (default: 0) --pair PAIR PAIR fifth, 5 % of it (default: 5 3) "
        "--rows ROWS [ROWS ...] of a list (default: 0 2) --none [NONE ...] of an empty list "
        "--percent PERCENT sixth (default: 50 %) --on, --no-on last (default: on)"
    )


def test_flags_are_found():
    flags = {(stage, flag) for stage, flag, _ in CASES}
    assert {
        ("caption", "--beams"),
        ("saliency", "--moments"),
        ("masking", "--row"),
        ("pretrain", "--blr"),
        ("finetune", "--mixup"),
        ("linprobe", "--seeds"),
        ("toy", "--seed"),
    } <= flags
    assert len(CASES) > 100


@pytest.mark.parametrize("stage", STAGES)
def test_stages_do_their_work_with_the_flags_that_the_others_vary(four, stage):
    assert outcome(stage, four) is None


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("stage, flag, values", CASES)
def test_a_number_is_refused_in_one_line_or_taken(four, stage, flag, values, value):
    if (stage, flag, value) in LONG:
        module, *flags = STAGES[stage]
        importlib.import_module(module).parse_args(
            [str(each) for each in (*flags, flag, *[value] * values)]
        )
        return
    line = outcome(stage, four, flag, *[value] * values)
    if value in REFUSED:
        assert line is not None and f"argument {flag}: expected " in line, line


# ---- paths ---------------------------------------------------------------------------------------


FOLDERS = ("pretrain", "finetune", "linprobe", "toy")  # their --out is a folder
WRONG = [
    *[
        (stage, "--data", path)
        for stage in (
            "caption",
            "saliency",
            "classes",
            "motion",
            "masking",
            "pretrain",
            "finetune",
            "linprobe",
        )
        for path in ("missing.csv", "data", "data/four.text.npy")
    ],
    ("video", "missing.csv"),
    *[
        (stage, "--out", path)
        for stage in FOLDERS
        for path in ("data/four.csv", "data/four.csv/run", "/proc/run")
    ],
    *[
        (stage, "--out", path)
        for stage in ("caption", "saliency", "classes", "motion")
        for path in ("data/four.csv/x.jsonl", "/proc/x.jsonl")
    ],
    *[
        ("masking", "--out", path)
        for path in (
            "data/four.csv",
            "mask",
            "mask.foo",
            "nowhere/mask.png",
            "data/four.csv/mask.png",
            "data",
        )
    ],
    *[("masking", "--video", path) for path in ("clip", "clip.foo", "nowhere/clip.mp4", "data")],
    *[("caption", "--out", path) for path in ("data/four.csv", "data/four.text.npy", "data")],
    *[
        (stage, "--device", name)
        for stage in (
            "caption",
            "saliency",
            "classes",
            "motion",
            "pretrain",
            "finetune",
            "linprobe",
        )
        for name in ("foo", "mps", "cuda", "cuda:7")
    ],
    *[
        (stage, "--max-steps", "9", "--root", "nowhere")
        for stage in ("caption", "saliency", "motion", "linprobe")
    ],
    ("labels", "--classes", "missing.txt"),
    ("labels", "--classes", "data"),
    ("labels", "--classes", "data/four.text.npy"),
    ("caption", "--model", "nowhere"),
    ("saliency", "--captions", "missing.jsonl"),
    ("saliency", "--captions", "data"),
    ("saliency", "--captions", "data/four.csv"),
    ("saliency", "--captions", "data/four.text.npy"),
    *[
        ("classes", "--classes", path)
        for path in ("missing.txt", "data", "data/four.csv/names.txt", "data/four.text.npy")
    ],
    *[(stage, "--clip", "local-dir:nowhere") for stage in ("saliency", "classes")],
    ("saliency", "--clip", "nowhere"),
    ("motion", "--flow", "raft", "--flow-weights", "missing.pth"),
    ("motion", "--flow", "raft", "--flow-weights", "data"),
    ("motion", "--flow", "raft", "--flow-weights", "data/four.csv"),
    *[
        ("pretrain", flag, path)
        for flag in ("--init", "--companions")
        for path in ("missing.pt", "data", "data/four.csv")
    ],
    *[
        ("finetune", flag, path)
        for flag in ("--checkpoint", "--val", "--test")
        for path in ("missing.pt", "data", "data/four.text.npy")
    ],
    *[
        ("linprobe", flag, path)
        for flag in ("--checkpoint", "--test")
        for path in ("missing.pt", "data", "data/four.text.npy")
    ],
    *[("video", "--good", path) for path in ("data/four.csv/good.csv", "data")],
    *[
        ("video", "--reencode", path)
        for path in ("data/four.csv", "data/four.csv/new", "/proc/new")
    ],
    ("toy", "--report", "nowhere"),
]


def contents(folder):
    """What the files beside four.csv hold, and the names in the folder."""
    files = [path for path in (folder / "data").iterdir() if path.is_file()]
    return {path.name: path.read_bytes() for path in files}, sorted(
        path.name for path in folder.iterdir()
    )


@pytest.fixture
def own(four, tmp_path):
    """A copy of the folder for one case, which may damage it."""
    shutil.copytree(four, tmp_path, symlinks=True, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.parametrize("case", WRONG, ids=" ".join)
def test_a_wrong_path_is_one_line_and_nothing_is_touched(own, case):
    stage, *more = case
    before = contents(own)
    if stage == "video" and len(more) == 1:  # the manifest itself, which is no flag there
        line = outcome(stage, own, replace=more[0])
    else:
        line = outcome(stage, own, *more)
    path = Path(more[-1].removeprefix("local-dir:"))
    named = (
        str(path),
        str(path.with_suffix(".json")),
        *[str(folder) for folder in path.parents if folder.name],
    )
    assert line is not None and any(name in line for name in named), line
    after = contents(own)
    assert after[0] == before[0]
    assert [name for name in after[1] if name != "out"] == before[1]
