"""Starting and stopping together. Being told to stop is SIGTERM, as a scheduler sends it, or Ctrl-C: a training run then saves and
ends, all ranks at the same step; a stage whose rows stand alone ends after its batch.

    join_ranks("nccl")                                  dist.init_process_group, for runs that torchrun may restart
    stop = StopSignal(ranks)
    loader = DataLoader(..., worker_init_fn=ignore_signals)
    for step in ...:
        ...
        if stop.agreed():                               the same answer on every rank
            save, and return
"""
import atexit
import multiprocessing
import os
import signal

import torch
import torch.distributed as dist


def join_ranks(backend, **options):
    """dist.init_process_group, each of torchrun's attempts (--max-restarts) under names of its own: its store outlives them, and
    gloo would connect to the addresses of ranks that are dead. On several nodes the attempts are counted apart: not there."""
    store, rank, ranks = next(dist.rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, **options)


class StopSignal:
    """Notes SIGTERM and SIGINT instead of ending the process; a second SIGINT does end it. name: of the signal, if this rank had one."""

    def __init__(self, ranks=1):
        self.name, self._group = None, None
        if ranks > 1:
            self._group = dist.new_group(backend="gloo")  # on the CPU: asking does not wait for the GPU
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)
        atexit.register(kill_workers)

    def _note(self, number, _):
        if number == signal.SIGINT and self.name == "SIGINT":
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def agreed(self):
        """Whether any rank was told to stop by now; every rank must ask, once a step."""
        told = torch.tensor(float(self.name is not None))
        if self._group is not None:
            dist.all_reduce(told, group=self._group)
        return told.item() > 0


def ignore_signals(_):
    """For the loader's workers: signals go to the whole process group, and the run still has to save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def kill_workers():
    """Loader's workers that are left when the process ends, of an error, would be waited for: they ignore the SIGTERM they get."""
    for worker in multiprocessing.active_children():
        worker.kill()
