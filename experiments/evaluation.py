"""Fine-tuning and probes of several encoders on the toy world, at one budget: the tables of
experiments/EVALUATION.md.

    ./demo.sh                                                               the toy world and runs/demo/text
    python pretrain.py --mask tube --nce-weight 0 --size tiny --repeat 4 --batch-size 32 --epochs 8 --warmup-epochs 1 --blr 8e-3 --out runs/demo/tube
    python experiments/evaluation.py "text + contrastive=runs/demo/text/checkpoint.pt" tube=runs/demo/tube/checkpoint.pt

runs finetune.py and linprobe.py for every encoder, an untrained one included, and both labels (the
action and the object), and prints two tables of their results. Run again, it does only what is
missing. About 40 minutes on one CPU core."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Light augmentation: in so few epochs the full recipe's mixing and erasing would be all there is to
#     learn.
FINETUNE = (
    "--size tiny --no-flip --epochs 10 --warmup-epochs 1 --blr 8e-3 --layer-decay 0.9 --batch-size 32 --repeat 2 --crop-scale 0.5 1 "
    "--mixup 0 --cutmix 0 --erase 0 --rand-augment 0 0 --views 2 1 --log-every 93 --resume auto"
).split()
PROBE = "--size tiny --attentive --seeds 3".split()


def run(script, *args):
    """Runs a stage, its output under the folder's name beside it; returns nothing."""
    print("+ python", script, *args, file=sys.stderr, flush=True)
    if subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, args)], stdout=sys.stderr
    ).returncode:
        sys.exit(f"{script} failed: see above")


def interval(pair):
    return f"{pair[0]:.3f} to {pair[1]:.3f}" if pair else ""


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("encoders", nargs="+", metavar="NAME=CHECKPOINT")
    parser.add_argument("--out", type=Path, default=Path("runs/evaluation"))
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args(argv)
    encoders = {"untrained": "none"} | dict(encoder.split("=", 1) for encoder in args.encoders)
    finetuned, probed = [], []
    for label, title in (("label", "action"), ("object", "object")):
        for name, checkpoint in encoders.items():
            folder = args.out / name.replace(" ", "")
            flags = ("--checkpoint", checkpoint, "--label-column", label, "--workers", args.workers)
            if not (folder / label / "test.json").exists():
                run("finetune.py", *FINETUNE, *flags, "--out", folder / label)
            found = json.loads((folder / label / "test.json").read_text())
            finetuned.append(
                (
                    title,
                    name,
                    f"{found['top1']:.3f}",
                    interval(found["top1_bootstrap"]),
                    f"{found['majority']:.3f}",
                )
            )
            if not (folder / f"{label}.json").exists():
                run("linprobe.py", *PROBE, *flags, "--out", folder)
            found = json.loads((folder / f"{label}.json").read_text())
            for probe in ("linear", "knn", "attentive"):
                probed.append(
                    (
                        title,
                        name,
                        probe,
                        f"{found[probe]:.3f}",
                        interval(found[f"{probe}_interval"]),
                        interval(found[f"{probe}_bootstrap"]),
                        f"{found['majority']:.3f}",
                    )
                )
    for head, rows in (
        (("fine-tuning", "from", "top-1", "95 % over test videos", "majority class"), finetuned),
        (
            (
                "probe of",
                "encoder",
                "probe",
                "accuracy",
                "95 % over seeds",
                "95 % over test videos",
                "majority class",
            ),
            probed,
        ),
    ):
        print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
        print("\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n")


if __name__ == "__main__":
    main()
