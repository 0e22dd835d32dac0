"""A run that is asked to end: it ends its micro-step, saves a checkpoint with all ranks, and ends as the signal says.

A scheduler that wants its machines back, or somebody's Ctrl-C, reaches one rank or all of them, at different moments.
So a signal only sets a flag; in each micro-step the ranks agree on it, and all of them save or none.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, ModuleType

import psutil
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sora_hw.devices.cpu import CPU

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # the last is what Slurm may send before the time is up
ONE_REQUEST = 3.0  # seconds within which several signals are one


class Interrupted(Exception):
    """A run that a signal has ended, with a checkpoint to go on from. `code` is the exit code, as shells have it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class StopOnSignal(TrainerCallback):
    """Ends training after the micro-step in which the ranks find that a signal has reached one, with a checkpoint.

    `asked()` is the signal's number on this rank. The trainer sets `agreed` to that of any rank, and `stopped_by` is
    what has ended the run. The gradients of a step that has not ended are given up: the checkpoint is of the step
    before, with the random numbers as they were then.

    A second signal ends this process at once, unless it comes in a moment: a terminal or a scheduler reaches every
    process, and DeepSpeed's launcher then passes on to its ranks what it got.
    """

    def __init__(self):
        self.received: int | None = None
        self.launchers: list[int] = []
        self.since = 0.0
        self.agreed: int | None = None
        self.stopped_by: int | None = None
        self.saved_step = 0
        self.random: list[torch.Tensor] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While training: before and after it there is nothing to save, and signals do what they always do."""
        self.launchers = _launchers()
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def asked(self) -> int:
        """The signal that this rank has received, 0 while there is none. The end of its launcher counts as SIGTERM:
        DeepSpeed's ends without a word to the ranks, which would train on where nobody sees them."""
        if self.received is None and _launchers() != self.launchers:
            self.received = signal.SIGTERM
        return self.received or 0

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > ONE_REQUEST:
            os._exit(128 + number)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.saved_step = state.global_step

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.saved_step = state.global_step

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.random = [each.get_rng_state() for each in _random_sources(args.device)]

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self.agreed:
            self.stopped_by, control.should_training_stop = self.agreed, True
            control.should_save = state.global_step > self.saved_step
            for source, before in zip(_random_sources(args.device), self.random, strict=True):
                source.set_rng_state(before)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self.agreed and state.global_step < state.max_steps:
            self.stopped_by = self.agreed
            # What is due after this step, a validation too, still happens: nobody does it later.
            control.should_log = control.should_save = control.should_training_stop = True


def _launchers() -> list[int]:
    """The processes that have started this rank and should outlive it: `deepspeed` does it by way of another."""
    parent = os.getppid()
    if "CROSS_RANK" in os.environ:
        with suppress(psutil.Error):
            return [parent, psutil.Process(parent).ppid()]
    return [parent] if "TORCHELASTIC_RUN_ID" in os.environ else []


def _random_sources(device: torch.device) -> list[ModuleType]:
    """What dropout draws from, the only thing in a step that is drawn."""
    return [torch] if device.type == CPU.type else [torch, torch.get_device_module(device)]
