"""Speed and time left are counted right, progress is told in lines, and a wrong engine is noticed."""

import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from sora_hw.devices.cpu import CPU
from sora_hw.errors import UserError
from sora_hw.training import deepspeed_config
from sora_hw.training.callbacks import Clock, ProgressBar, duration
from sora_hw.training.deepspeed_config import check_engine


@pytest.fixture
def clock(monkeypatch):
    """A clock over 10 steps of 100 tokens each, started at step 4 at second 50 of a time that tests set."""
    now = {"time": 50.0}
    monkeypatch.setattr("time.monotonic", lambda: now["time"])
    clock = Clock([100] * 10, samples=40, global_batch=8)
    clock.on_train_begin(None, SimpleNamespace(global_step=4), None)

    def finish_step(step, time):
        now["time"] = time
        state = SimpleNamespace(global_step=step, epoch=None, max_steps=10)
        clock.on_step_end(None, state, None)
        return state

    clock.finish_step = finish_step
    return clock


def test_the_clock_counts_only_what_this_process_ran(clock):
    assert clock.tokens_per_second == clock.seconds_left() == 0
    state = clock.finish_step(6, 54.0)
    assert clock.tokens_per_second == pytest.approx(2 * 100 / 4)
    assert clock.seconds_left() == pytest.approx(4 * 2)
    assert state.epoch == pytest.approx(6 * 8 / 40)


def test_progress_without_a_terminal_is_a_line_now_and_then(clock):
    console = Console(file=io.StringIO(), width=200)
    bar = ProgressBar(clock, console)
    bar.on_train_begin(None, SimpleNamespace(global_step=4, max_steps=10), None)
    bar.on_log(None, clock.finish_step(5, 52.0), None, logs={"loss": 1.5})
    bar.on_log(None, clock.finish_step(6, 54.0), None, logs={"eval_loss": 1.25})
    bar.on_train_end(None, None, None)
    assert console.file.getvalue().splitlines() == [
        "step 5/10  loss 1.5000  50 tokens/s  0:10 left",
        "step 6/10  validation loss 1.2500",
    ]


def test_durations():
    assert [duration(seconds) for seconds in (0, 59.6, 3599, 3723)] == ["0:00", "1:00", "59:59", "1:02:03"]


def engine(stage=2, batch=8, accumulation=2, bf16=False, parameters=(torch.nn.Parameter(torch.zeros(4)),)):
    return SimpleNamespace(
        zero_optimization_stage=lambda: stage,
        train_batch_size=lambda: batch,
        gradient_accumulation_steps=lambda: accumulation,
        bfloat16_enabled=lambda: bf16,
        module=SimpleNamespace(parameters=lambda: iter(parameters)),
    )


def plan(stage=2):
    batch = SimpleNamespace(global_batch=8, accumulation=2, world_size=2)
    return SimpleNamespace(batch=batch, profile=SimpleNamespace(zero_stage=stage, dtype="float32"), device=CPU)


def test_the_start_up_check_notices_what_goes_wrong_silently(monkeypatch):
    monkeypatch.setattr(deepspeed_config.dist, "get_world_size", lambda: 2)
    check_engine(engine(), plan())
    whole = torch.nn.Parameter(torch.zeros(4))
    sharded = torch.nn.Parameter(torch.zeros(0))
    sharded.ds_tensor, sharded.ds_numel = torch.zeros(2), 4
    check_engine(engine(stage=3, parameters=[whole, sharded]), plan(stage=3))
    for wrong, message in (
        (engine(stage=1), "instead of"),
        (engine(batch=4), "instead of"),
        (engine(accumulation=1), "instead of"),
        (torch.nn.Linear(1, 1), "without DeepSpeed"),
        (engine(parameters=[whole, torch.nn.Parameter(torch.zeros(1, device="meta"))]), "is on meta instead of cpu"),
    ):
        with pytest.raises(UserError, match=message):
            check_engine(wrong, plan())
    with pytest.raises(UserError, match="shards nothing"):
        check_engine(engine(stage=3, parameters=[whole]), plan(stage=3))
    monkeypatch.setattr(deepspeed_config.dist, "get_world_size", lambda: 1)
    with pytest.raises(UserError, match="1 ranks started instead of 2"):
        check_engine(engine(), plan())
