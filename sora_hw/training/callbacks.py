"""What happens beside the training steps: the check of DeepSpeed at the start, and progress for the eyes."""

import atexit
import time
from collections.abc import Sequence

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sora_hw.terminal import Console
from sora_hw.training.deepspeed_config import check_engine
from sora_hw.training.plan import Plan

PLAIN_LINES = 20  # in a run whose output is not a terminal


class EngineCheck(TrainerCallback):
    """Stops a run whose DeepSpeed engine is not the planned one before its first step."""

    def __init__(self, trainer: Trainer, plan: Plan):
        self.trainer, self.plan = trainer, plan

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        check_engine(self.trainer.model_wrapped, self.plan)


class LastLoss(TrainerCallback):
    """Logs the loss of the last step, whatever the steps between logs: every run ends with a loss to show."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_log = True


class Clock(TrainerCallback):
    """Counts passes over the data and measures the time and the tokens of the steps that this process ran.

    `tokens` are those of each optimiser step over all ranks, `samples` the size of the training data. For the log, the
    speed since the last entry is measured too, without the pauses for validation and checkpoints.
    """

    def __init__(self, tokens: Sequence[int], samples: int, global_batch: int):
        self.tokens, self.taken, self.taken_before = tokens, 0, 0  # of the run so far; until the last entry in the log
        self.passes_per_step = global_batch / samples
        self.first = self.last = 0
        self.started = self.elapsed = 0.0
        self.stopped = self.since = 0.0  # when training last paused; when the interval since the last entry began

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.first = self.last = state.global_step
        self.taken = self.taken_before = 0
        self.started = self.stopped = self.since = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.stopped = time.monotonic()
        self.taken += sum(self.tokens[step] for step in range(self.last, state.global_step))
        self.last, self.elapsed = state.global_step, self.stopped - self.started
        state.epoch = state.global_step * self.passes_per_step  # the Trainer takes the whole order for one epoch

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._go_on()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._go_on()

    def _go_on(self) -> None:
        now = time.monotonic()
        self.since += now - self.stopped
        self.stopped = now

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks, since the start of training; validation and checkpoints count as time."""
        return self.taken / self.elapsed if self.elapsed else 0.0

    def lap(self) -> float:
        """Tokens per second over all ranks since the last lap, pauses left out."""
        tokens, seconds = self.taken - self.taken_before, self.stopped - self.since
        self.taken_before, self.since = self.taken, self.stopped
        return tokens / seconds if seconds else 0.0

    def seconds_left(self) -> float:
        """At the pace so far."""
        done, steps = self.last - self.first, len(self.tokens)
        return self.elapsed / done * (steps - self.last) if done else 0.0


class ProgressBar(TrainerCallback):
    """Rank 0's progress: a bar on a terminal, now and then a line elsewhere."""

    def __init__(self, clock: Clock, console: Console):
        self.clock, self.console = clock, console
        self.bar: Progress | None = None
        self.printed = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.printed = state.global_step
        if self.console.is_terminal:
            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}  {task.fields[speed]}"),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=self.console)
            self.bar.start()
            atexit.register(self.bar.stop)  # an error would leave the terminal without its cursor
            self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step, loss="-", speed="-")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs):
        step = state.global_step
        if "eval_loss" in logs:
            self.console.print(f"step {step}/{state.max_steps}  validation loss {logs['eval_loss']:.4f}")
        if "loss" not in logs:
            return
        loss, speed = f"{logs['loss']:.4f}", f"{self.clock.tokens_per_second:,.0f} tokens/s"
        if self.bar:
            self.bar.update(self.task, completed=step, loss=loss, speed=speed)
        elif step == state.max_steps or step - self.printed >= max(1, state.max_steps // PLAIN_LINES):
            self.printed = step
            left = duration(self.clock.seconds_left())
            self.console.print(f"step {step}/{state.max_steps}  loss {loss}  {speed}  {left} left")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self.bar:
            self.bar.stop()


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
