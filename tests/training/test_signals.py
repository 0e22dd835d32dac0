"""A run that is asked to end leaves a checkpoint and no process, and ends as the signal has it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from sora_hw.training import signals
from sora_hw.training.checkpoints import newest
from sora_hw.training.signals import StopOnSignal

LAUNCHER = Path(__file__).resolve().parents[2] / "launchers" / "commonsense.py"
STEPS = 2000


def begin(folder: Path, ranks: int, *arguments: object) -> subprocess.Popen:
    """A run in a session of its own, which would take many minutes, in its second step or later."""
    command = [sys.executable, str(LAUNCHER)]
    if ranks:
        port = str(20000 + os.getpid() % 20000)
        command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(ranks)]
        command += ["--master_port", port, str(LAUNCHER)]
    given = ["--backend", "cpu", "--output", folder, *arguments, "--max-steps", STEPS, "--save-steps", 1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen(list(map(str, [*command, *given])), env=environment, start_new_session=True, **pipes)
    while not (folder / "checkpoint-2").exists():
        assert run.poll() is None, run.communicate()[1][-3000:]
        time.sleep(0.05)
    return run


@pytest.fixture
def arguments(tiny_model, records_file):
    sizes = ["--global-batch", 4, "--micro-batch", 2, "--validation-size", 0, "--rank", 2]
    return ["--model", tiny_model, "--train-data", records_file, *sizes]


def check_left(folder: Path, run: subprocess.Popen) -> None:
    """It can be gone on from, nothing is half written, and no process is left."""
    manifest = json.loads((folder / "run.json").read_text())
    assert manifest["status"] == "interrupted"
    checkpoint, passed_over = newest(folder)
    assert passed_over == [] and int(checkpoint.name.removeprefix("checkpoint-")) >= 2
    left = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("checkpoint-"))
    assert left == ["run.json"] and not list(folder.glob("*.part"))
    until = time.monotonic() + 60  # DeepSpeed's launcher, of which `run` is the first part, may end before its ranks
    while left := [each for each in psutil.process_iter() if _lives_in(each, run.pid)]:
        assert time.monotonic() < until, left
        time.sleep(0.1)


def _lives_in(process: psutil.Process, session: int) -> bool:
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_plain_run(tmp_path, arguments, finish, number):
    folder = tmp_path / "run"
    run = begin(folder, 0, *arguments)
    run.send_signal(number)
    done = finish(run)
    assert done.returncode == 128 + number
    assert done.stderr == "interrupted; --resume goes on from the last checkpoint, a --sweep by itself\n"
    check_left(folder, run)


@pytest.mark.parametrize("reached", ["one rank", "the launcher", pytest.param("all processes", marks=pytest.mark.full)])
def test_two_ranks_agree(tmp_path, arguments, finish, reached):
    folder = tmp_path / "run"
    run = begin(folder, 2, *arguments)
    if reached == "all processes":
        os.killpg(run.pid, signal.SIGTERM)  # as a scheduler does
    elif reached == "the launcher":
        run.kill()  # it cannot tell its ranks
    else:
        ranks = [
            each for each in psutil.Process(run.pid).children(recursive=True) if "--local_rank=1" in each.cmdline()
        ]
        ranks[0].send_signal(signal.SIGUSR1)
    done = finish(run)
    assert done.returncode not in (0, None)
    check_left(folder, run)


def test_in_every_micro_step(tmp_path, arguments):
    """The checkpoint is of the last step that ended, and the run goes on from there as if nothing had been, dropout
    included. In a process of its own, which DeepSpeed takes for itself."""
    program = Path(__file__).with_name("signal_program.py")
    command = [sys.executable, program, tmp_path, *arguments, "--dropout", 0.2, "--max-steps", 3, "--save-steps", 100]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    saved = {1: None, 2: 1, 3: 1, 4: 2, 5: 2}  # by micro-step, of which two make a step; what each has left
    assert json.loads(done.stdout) == [[micro_step, saved[micro_step], True] for micro_step in saved]


def test_a_second_signal_ends_at_once_unless_it_is_the_same_request(monkeypatch):
    ended, now = [], [100.0]
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
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_in_the_last_step_changes_nothing():
    for step, stops in ((9, True), (10, False)):
        stop, control = StopOnSignal(), SimpleNamespace(should_save=False, should_training_stop=False)
        stop.agreed = 15
        stop.on_step_end(SimpleNamespace(device="cpu"), SimpleNamespace(global_step=step, max_steps=10), control)
        assert control.should_save == control.should_training_stop == stops and bool(stop.stopped_by) == stops
