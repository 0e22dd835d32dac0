"""Speed and time left are counted right, and progress is told in lines."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from sora_hw.training.callbacks import Clock, ProgressBar, duration


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

    def pause(event, until):
        now["time"] = until
        event(None, None, None)

    clock.finish_step, clock.pause = finish_step, pause
    return clock


def test_the_clock_counts_only_what_this_process_ran(clock):
    assert clock.tokens_per_second == clock.seconds_left() == 0
    state = clock.finish_step(6, 54.0)
    assert clock.tokens_per_second == pytest.approx(2 * 100 / 4)
    assert clock.seconds_left() == pytest.approx(4 * 2)
    assert state.epoch == pytest.approx(6 * 8 / 40)


def test_a_lap_is_the_speed_since_the_last_one_without_the_pauses(clock):
    clock.finish_step(5, 52.0)
    assert clock.lap() == pytest.approx(100 / 2)
    clock.pause(clock.on_evaluate, 60.0)
    clock.finish_step(6, 61.0)
    clock.pause(clock.on_save, 70.0)
    clock.pause(clock.on_evaluate, 75.0)
    clock.finish_step(7, 78.0)
    assert clock.lap() == pytest.approx(2 * 100 / (1 + 3))
    assert clock.lap() == 0, "no step since"
    assert clock.tokens_per_second == pytest.approx(3 * 100 / 28), "the whole run's speed counts them"


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
