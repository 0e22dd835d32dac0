"""The demo's adapter and its un-tuned base on all of the shared questions: the same scores on one and two ranks, at
batch sizes 1 and 16, and after two interruptions. It takes half an hour on two cores."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from sora_hw.evaluation.tasks import TASKS
from sora_hw.finished.scores import read_facts, read_scores

LAUNCHERS = Path(__file__).resolve().parents[2] / "launchers"
PIECES = 8 * 2 + 6  # both protocols for commonsense, generation for arithmetic
RECORDS = 2 * (7 * 400 + 380) + 164 + 65 + 31 + 120 + 38 + 45


def start(ranks: int, launcher: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable] if ranks == 1 else [str(Path(sys.executable).with_name("deepspeed"))]
    if ranks > 1:
        command += ["--num_accelerators", str(ranks), "--master_port", str(20000 + os.getpid() % 20000)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command += [str(LAUNCHERS / launcher), "--backend", "cpu", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, start_new_session=True)  # all that it starts is one group


def written(folder: Path) -> int:
    lines = 0
    for file in folder.glob("*/*.jsonl"):
        with suppress(FileNotFoundError):  # the ranks' parts of a task are put together meanwhile
            lines += file.read_text().count("\n")
    return lines


def interrupt(process: subprocess.Popen, how: signal.Signals, folder: Path, least: int) -> None:
    """End a scoring and all its ranks once there are so many predictions."""
    while written(folder) < least:
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.2)
    os.killpg(process.pid, how)
    process.wait(120)
    assert least <= written(folder) < RECORDS and not (folder / "scores.json").exists()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    assert start(2, "commonsense.py", "--output", folder).wait() == 0
    return folder


@pytest.mark.full
@pytest.mark.shared_data
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("which", ["adapter", "base"])
def test_ranks_batches_and_interruptions_change_no_score(which, demo, shared_data, tmp_path):
    what = ["--model", "embedded"] if which == "base" else ["--adapter", demo, "--tasks", *TASKS]
    what += ["--data", shared_data / "commonsense", shared_data / "math", "--output"]
    assert start(1, "score.py", *what, tmp_path / "one").wait() == 0
    scores = read_scores(tmp_path / "one")
    assert len({(each.protocol, each.task) for each in scores}) == PIECES

    assert start(1, "score.py", *what, tmp_path / "batch 1", "--batch-size", 1).wait() == 0
    assert read_scores(tmp_path / "batch 1") == scores

    two = tmp_path / "two"
    interrupt(start(2, "score.py", *what, two), signal.SIGINT, two, 1500)
    interrupt(start(1, "score.py", *what, two, "--batch-size", 5), signal.SIGKILL, two, 3500)
    assert start(2, "score.py", *what, two).wait() == 0
    assert read_scores(two) == scores
    assert read_facts(two)["counts"] == read_facts(tmp_path / "one")["counts"]
