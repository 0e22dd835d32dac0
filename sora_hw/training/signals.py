"""A run that is asked to end: it finishes its step, saves a checkpoint with all ranks, and ends as the signal has it.

A scheduler that wants its machines back, or somebody's Ctrl-C, reaches one rank or all of them, at different moments.
So a signal only sets a flag; after each step the ranks agree on it, and all of them save or none.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # the last is what Slurm may send before the time is up


class Interrupted(Exception):
    """A run that a signal has ended, with a checkpoint to go on from. `code` is the exit code, as shells have it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class StopOnSignal(TrainerCallback):
    """Ends training after the step in which a signal has reached any rank, with a checkpoint.

    `stopped_by` is the signal's number then. The same signal a second time ends this process at once. Another one does
    not: after a Ctrl-C, DeepSpeed's launcher passes SIGTERM to ranks that the terminal has given SIGINT.
    """

    def __init__(self):
        self.received: set[int] = set()
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
        if number in self.received:
            os._exit(128 + number)
        self.received.add(number)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        first = torch.tensor(min(self.received, default=0), device=args.device)
        dist.all_reduce(first, op=dist.ReduceOp.MAX)
        if first.item() and state.global_step < state.max_steps:
            self.stopped_by = int(first.item())
            # What is due after this step, a validation too, still happens: nobody does it later.
            control.should_log = control.should_save = control.should_training_stop = True
