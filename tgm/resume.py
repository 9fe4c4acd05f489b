"""The folder of a training run: its checkpoint, its flags and its log; and resuming a run. Needs
arrays.py, checkpoints.py and run.py.

    saved = find_run(out, args.resume, vars(args), MAY_CHANGE)      # None: a run that begins
    state = TrainingState(model, optimizer, scaler, step=0)
    if saved: state.restore(saved)
    # all ranks wait for one another here: each has read the checkpoint when rank 0 takes the folder
    refuse_unequal_ranks(state.step, vars(args))
    take_folder(out, args.resume, vars(args), state.step)           # on rank 0
    ...
    state.save(out / "checkpoint.pt", vars(args))                   # on rank 0

A run goes on with the flags and the data that it was begun with. Besides its flags, args hold:

    stage       the script, such as "pretrain.py"
    ranks       how many there are
    identity    {what: text or number}: what must be as it was besides the flags, such as the
                hash of the manifest
"""

import contextlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tgm import checkpoints
from tgm.arrays import hold
from tgm.run import RunError, give_up_together, make_folder, torchrun_ranks, writing

# What may differ from the checkpoint: how a run is carried out, up to where, and where it writes.
# Of batch_size and ranks only the product must stay, and it is in the identity; lr follows from
# other flags; `refuse_changes` compares the identity by itself.
MAY_CHANGE = {
    "workers", "device", "compile", "checkpointing", "video_timeout", "max_bad", "max_steps",
    "log_every", "save_every", "out", "resume", "batch_size", "ranks", "lr", "identity",
}  # fmt: skip
# Flags that may differ from node to node.
OF_A_NODE = {
    "workers", "device", "video_timeout", "resume", "root", "data", "val", "test", "companions",
    "out", "identity",
}  # fmt: skip
REMEDY = "write elsewhere (--out), or begin again with --resume none"


# ---- the checkpoint ------------------------------------------------------------------------------


class TrainingState:
    """What a checkpoint holds besides the flags: the states of model, optimizer and scaler, and
    numbers of the script, such as the step, which are attributes here."""

    def __init__(self, model, optimizer, scaler, **numbers):
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        self.begun_for = None  # the epochs that a restored run was begun for
        self.names = tuple(numbers)
        vars(self).update(numbers)

    def restore(self, saved: dict):
        """Takes over the contents of a checkpoint."""
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:  # empty if it was saved without fp16
            self.scaler.load_state_dict(saved["scaler"])
        for name in self.names:
            setattr(self, name, saved[name])
        self.begun_for = saved["args"]["epochs"]

    def save(self, path: Path, flags: dict):
        """Writes a checkpoint. If the run is killed meanwhile, `path` still holds a whole one: this
        or the one before."""
        numbers = {name: getattr(self, name) for name in self.names}
        checkpoints.save_checkpoint(
            path,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            args=flags,
            **numbers,
        )


def find_run(out: Path, resume: str | None, flags: dict, may_change: set) -> dict | None:
    """The contents of the checkpoint in `out` if the run goes on from it; None if there is none or
    --resume none begins again.

    RunError if it is of another run, cannot be read, or --resume was not given."""
    path = out / "checkpoint.pt"
    if resume == "none" or not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        before = dict(saved.get("args", {}))
    except Exception as error:  # garbage makes the parser raise anything
        reason = type(error).__name__
        raise RunError(f"{path}: no checkpoint that can be read safely ({reason})") from None
    if torchrun_ranks()[0] > 0:
        may_change = may_change | OF_A_NODE
        flags = flags | {"identity": under_names_of(before, flags["identity"])}
    refuse_changes(path, before, flags, may_change)
    if resume is None:
        raise RunError(
            f"{path} is there already: --resume auto goes on from it, --resume none begins again "
            "and keeps it as checkpoint.old.pt, --out writes elsewhere"
        )
    return saved


def under_names_of(before: dict, identity: dict) -> dict:
    """An identity whose names are replaced by those of a checkpoint, in their order. The names are
    paths, such as {"data/train.csv": hash}, and the checkpoint has rank 0's: on another node the
    same file may have another path. before: the flags of the checkpoint."""
    return dict(zip(before.get("identity", {}), identity.values(), strict=False))


def refuse_changes(path: Path, before: dict, now: dict, may_change: set):
    """RunError, naming what differs, if the flags and the identity of a run are not those that its
    checkpoint holds. A flag that only one of the two has is not compared.

    path: the checkpoint; may_change: the names of flags that may differ; --epochs may grow. Values
    are compared as json has them, so that a tuple equals its list."""
    if before.get("stage") != now["stage"]:
        raise RunError(f"{path}: no checkpoint of {now['stage']}: {REMEDY}")
    if now["epochs"] > before["epochs"]:
        may_change = may_change | {"epochs"}
    changed = []
    for name, value in now.items():
        if name in may_change or name not in before:  # older checkpoints have fewer flags
            continue
        if as_json(before[name]) != as_json(value):
            changed.append(f"--{name.replace('_', '-')} was {before[name]}, is {value}")
    for what, value in now["identity"].items():
        known = before["identity"].get(what)
        if known != value:
            changed.append(f"{what} was {known or 'not there'}, is {value or 'not there'}")
    if changed:
        raise RunError(
            f"{path}: another run: {'; '.join(changed)}. Give the flags and the data it was begun "
            f"with, {REMEDY}"
        )


def as_json(value):
    return json.dumps(value, default=str)


def refuse_unequal_ranks(step: int, flags: dict):
    """Ends the run on all ranks if they were started with other flags or data, or would go on from
    other steps, as nodes do that do not share a folder."""
    if not dist.is_initialized():
        return
    own = {name: value for name, value in flags.items() if name not in OF_A_NODE}
    own["what it reads"] = list(flags["identity"].values())
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, (step, own))
    first_step, first = found[0]
    for rank, (its_step, its_own) in enumerate(found):
        if its_step != first_step:
            give_up_together(
                f"--out {flags['out']}: rank 0 would go on from step {first_step}, rank {rank} "
                f"from step {its_step}: all nodes must see the same folder"
            )
        for name, value in its_own.items():
            if value != first[name]:
                give_up_together(
                    f"{name} is {first[name]} on rank 0, {value} on rank {rank}: start every node "
                    "alike"
                )


# ---- the folder ----------------------------------------------------------------------------------


def take_folder(out: Path, resume: str | None, flags: dict, step: int):
    """Makes the folder of a run, keeps other processes from it, cuts the log after `step`, where
    the run begins or goes on, and writes args.json. --resume none first renames checkpoints and log
    of the old run, if it saved: of a run that did not, nothing is worth keeping."""
    make_folder(out)
    hold(out / "checkpoint.pt")
    if resume == "none" and (out / "checkpoint.pt").exists():
        # At once: if this run is killed before it saves, --resume auto must not find the old one.
        # checkpoint.pt last: after a kill in between, the same command goes on with the rest.
        for name in ("best.pt", "log.jsonl", "checkpoint.pt"):
            path = out / name
            with writing(path), contextlib.suppress(FileNotFoundError):
                path.replace(path.with_suffix(f".old{path.suffix}"))
    path = out / "args.json"
    with writing(path):
        aside = path.with_name("args.json.new")
        aside.write_text(json.dumps(flags, indent=1) + "\n")
        aside.replace(path)
    with writing(out / "log.jsonl"):
        keep_log(out / "log.jsonl", step)


def keep_log(path: Path, step: int):
    """Cuts a log.jsonl back to the lines up to `step`, the checkpoint's. What follows is void, and
    so is a line that a full disk or a kill left half written. The old file stands until the new one
    is whole."""
    lines = []
    if step > 0 and path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = []
    broken = 0
    for line in lines:
        try:
            is_kept = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            broken += 1
            continue
        if is_kept:
            kept.append(line + "\n")
    if broken > 0:
        print(f"{path}: {broken} broken line{'s' if broken > 1 else ''} dropped", file=sys.stderr)
    aside = path.with_name(path.name + ".new")
    aside.write_text("".join(kept), encoding="utf-8")
    aside.replace(path)
