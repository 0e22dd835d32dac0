"""A run that is asked to end leaves a checkpoint and no process, and ends as the signal has it."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from warm import Warm, by_deepspeed, with_programs

from sora_hw.training import signals
from sora_hw.training.checkpoints import newest
from sora_hw.training.signals import StopOnSignal

LAUNCHER = Path(__file__).resolve().parents[2] / "launchers" / "commonsense.py"
STEPS = 2000


@contextmanager
def begun(warm: Warm, folder: Path, ranks: int, *arguments: object) -> Iterator[int]:
    """A run in a session of its own, which would take many minutes, in its second step or later: its first process."""
    given = ["--backend", "cpu", "--output", folder, *arguments, "--max-steps", STEPS, "--save-steps", 1]
    program = [*(by_deepspeed(ranks) if ranks else ()), str(LAUNCHER), *map(str, given)]
    environment = with_programs({**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    with warm.begun(program, folder.parent, environment, folder.parent) as process:
        while not (folder / "checkpoint-2").exists():
            assert _lives_in(psutil.Process(process), process), (folder.parent / "stderr").read_text()[-3000:]
            time.sleep(0.05)
        yield process


@pytest.fixture
def arguments(tiny_model, records_file):
    sizes = ["--global-batch", 4, "--micro-batch", 2, "--validation-size", 0, "--rank", 2]
    return ["--model", tiny_model, "--train-data", records_file, *sizes]


def check_left(folder: Path, session: int) -> None:
    """It can be gone on from, nothing is half written, and no process is left."""
    until = time.monotonic() + 60  # the first part of DeepSpeed's launcher may end before its ranks
    while left := [each for each in psutil.process_iter() if _lives_in(each, session)]:
        assert time.monotonic() < until, left
        time.sleep(0.1)
    manifest = json.loads((folder / "run.json").read_text())
    assert manifest["status"] == "interrupted"
    checkpoint, passed_over = newest(folder)
    assert passed_over == [] and int(checkpoint.name.removeprefix("checkpoint-")) >= 2
    left = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("checkpoint-"))
    assert left == ["run.json"] and not list(folder.glob("*.part"))


def _lives_in(process: psutil.Process, session: int) -> bool:
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_plain_run(tmp_path, arguments, warm, number):
    folder = tmp_path / "run"
    with begun(warm, folder, 0, *arguments) as run:
        os.kill(run, number)
        assert warm.end(run) == 128 + number
    said = (tmp_path / "stderr").read_text()
    assert said == "interrupted; --resume goes on from the last checkpoint, a --sweep by itself\n"
    check_left(folder, run)


@pytest.mark.parametrize("reached", ["one rank", "the launcher", pytest.param("all processes", marks=pytest.mark.full)])
def test_two_ranks_agree(tmp_path, arguments, warm, reached):
    folder = tmp_path / "run"
    with begun(warm, folder, 2, *arguments) as run:
        if reached == "all processes":
            os.killpg(run, signal.SIGTERM)  # as a scheduler does
        elif reached == "the launcher":
            os.kill(run, signal.SIGKILL)  # it cannot tell its ranks
        else:
            *_, second = psutil.Process(run).children(recursive=True)
            second.send_signal(signal.SIGUSR1)
        assert warm.end(run) != 0
    check_left(folder, run)


def test_in_every_micro_step(tmp_path, arguments, warm):
    """The checkpoint is of the last step that ended, and the run goes on from there as if nothing had been, dropout
    included. In a process of its own, which DeepSpeed takes for itself."""
    program = Path(__file__).with_name("signal_program.py")
    command = [program, tmp_path, *arguments, "--dropout", 0.2, "--max-steps", 3, "--save-steps", 100]
    done = warm.run(list(map(str, command)), tmp_path, os.environ)
    assert done.returncode == 0, done.stderr[-4000:]
    saved = {1: None, 2: 1, 3: 1, 4: 2, 5: 2}  # by micro-step, of which two make a step; what each has left
    assert json.loads(done.stdout) == [[micro_step, saved[micro_step], True] for micro_step in saved]


def test_a_second_signal_ends_at_once_unless_it_is_the_same_request(monkeypatch):
    ended, now, before = [], [100.0], signal.getsignal(signal.SIGINT)  # a shell's job in the background ignores it
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    stop = StopOnSignal()
    with stop.listening():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # from a launcher, for the same Ctrl-C
        assert ended == [] and stop.received == signal.SIGINT
        now[0] += 5
        signal.raise_signal(signal.SIGTERM)
        assert ended == [143]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_in_the_last_step_changes_nothing():
    for step, stops in ((9, True), (10, False)):
        stop, control = StopOnSignal(), SimpleNamespace(should_save=False, should_training_stop=False)
        stop.agreed = 15
        stop.on_step_end(SimpleNamespace(device="cpu"), SimpleNamespace(global_step=step, max_steps=10), control)
        assert control.should_save == control.should_training_stop == stops and bool(stop.stopped_by) == stops
