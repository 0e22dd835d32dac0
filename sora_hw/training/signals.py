"""A run that is asked to end: it finishes its step, saves a checkpoint with all ranks, and ends as the signal has it.

A scheduler that wants its machines back, or somebody's Ctrl-C, reaches one rank or all of them, at different moments.
So a signal only sets a flag; after each step the ranks agree on it, and all of them save or none.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # the last is what Slurm may send before the time is up
ONE_REQUEST = 3.0  # seconds within which several signals are one


class Interrupted(Exception):
    """A run that a signal has ended, with a checkpoint to go on from. `code` is the exit code, as shells have it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class StopOnSignal(TrainerCallback):
    """Ends training after the step in which a signal has reached any rank, with a checkpoint.

    `stopped_by` is the signal's number then. A second signal ends this process at once, unless it comes in a moment: a
    terminal or a scheduler reaches every process, and DeepSpeed's launcher then passes on to its ranks what it got.
    """

    def __init__(self):
        self.received: int | None = None
        self.since = 0.0
        self.stopped_by: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While training: before and after it there is nothing to save, and signals do what they always do."""
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > ONE_REQUEST:
            os._exit(128 + number)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        received = torch.tensor(self.received or 0, device=args.device)
        dist.all_reduce(received, op=dist.ReduceOp.MAX)
        if received.item() and state.global_step < state.max_steps:
            self.stopped_by = int(received.item())
            # What is due after this step, a validation too, still happens: nobody does it later.
            control.should_log = control.should_save = control.should_training_stop = True
