"""Being told to stop: SIGTERM, as a scheduler sends it, or Ctrl-C. A training run then saves and ends, all ranks at the same step.

    stop = StopSignal(ranks)                            after dist.init_process_group
    loader = DataLoader(..., worker_init_fn=ignore_signals)
    for step in ...:
        ...
        if stop.agreed():                               the same answer on every rank
            save, and return
"""
import atexit
import multiprocessing
import signal

import torch
import torch.distributed as dist


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
