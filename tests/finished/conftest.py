"""A finished run of the embedded model, made without training, and the scoring program in this process."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sora_hw.data.embedded import MODEL_PATH
from sora_hw.finished import score
from sora_hw.hardware import PROFILES
from sora_hw.recipes import commonsense
from sora_hw.training.methods import add_method

LAUNCHER = Path(__file__).resolve().parents[2] / "launchers" / "score.py"


@pytest.fixture(scope="session")
def embedded_run(tmp_path_factory) -> Path:
    """A run's folder with an adapter of random weights, large enough to change what the model says."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    recipe = commonsense.embedded()
    torch.manual_seed(0)
    model = add_method(AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32), recipe, "CAUSAL_LM")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder / "adapter")
    manifest = {"recipe": asdict(recipe), "status": "finished", "device": "cpu"}
    manifest["results"] = {"steps": 150, "final_loss": 0.5, "seconds": 75.0, "trainable_percent": 4.0, "test": {}}
    manifest["profile"] = asdict(PROFILES["cpu"])
    (folder / "run.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def score_here(monkeypatch, capfd) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Runs the scoring program in this process as one rank: exit code, standard output, standard error."""
    before, threads = dict(os.environ), torch.get_num_threads()
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        code = score.main(["--backend", "cpu", *map(str, arguments)])
        return code, *capfd.readouterr()

    yield run
    os.environ.clear()
    os.environ.update(before)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def questions(tmp_path_factory) -> Path:
    """A data folder with a few questions of two tasks of commonsense and two of arithmetic."""
    folder = tmp_path_factory.mktemp("questions")
    things = ["robin", "plum", "hammer", "coat", "bus", "carp", "violin", "leek", "sofa", "moth"]
    truths = [
        {
            "id": f"boolq/{number}",
            "instruction": f"Please answer the following question with true or false, question: is a {thing} a bird?"
            + " Think well." * (number * 7 % 5)
            + "\n\nAnswer format: true/false",
            "input": "",
            "output": f"the correct answer is {str(thing == 'robin').lower()}",
            "answer": str(thing == "robin").lower(),
            "question": f"is a {thing} a bird?",
            "choices": ["true", "false"],
            "label": int(thing != "robin"),
        }
        for number, thing in enumerate(things)
    ]
    blanks = [
        {
            "id": f"winogrande/{number}",
            "instruction": f"Fill the blank: The {thing} was by the pot because _ was red.\n\n"
            f"Option1: {thing} Option2: pot Answer format: option1/option2",
            "answer": f"option{1 + number % 2}",
            "question": f"The {thing} was by the pot because _ was red.",
            "choices": [thing, "pot"],
            "label": number % 2,
        }
        for number, thing in enumerate(things[:6])
    ]
    letters = [
        {"instruction": f"What is {number} + 1? Answer Choices: (A) {number} (B) {number + 1}", "answer": "B"}
        for number in range(4)
    ]
    sums = [{"instruction": f"What is {number} + 1?", "answer": number + 1.0} for number in range(4)]  # as numbers
    (folder / "boolq.test.jsonl").write_text("\n".join(map(json.dumps, truths)))
    (folder / "winogrande.test.json").write_text(json.dumps(blanks))
    (folder / "AQuA.test.jsonl").write_text("\n".join(map(json.dumps, letters)))
    (folder / "AddSub").mkdir()
    (folder / "AddSub" / "test.json").write_text(json.dumps(sums))  # where LLM-Adapters has it
    return folder


@pytest.fixture(scope="session")
def two_ranks() -> Callable[..., str]:
    """Runs the launcher on two ranks to its end; what it printed."""
    return _two_ranks


def _two_ranks(*arguments: object, backend: str = "cpu", **variables: str) -> str:
    """What the launcher prints when two ranks have run it to the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, str(LAUNCHER), "--backend", backend, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    environment |= {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen(
            [*command, f"--local_rank={number}"],
            env={**environment, "RANK": str(number), "LOCAL_RANK": str(number)},
            **pipes,
        )
        for number in range(2)
    ]
    try:
        (out, err), (other_out, other_err) = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], err + other_err
    assert other_out == "", "rank 0 alone speaks"
    return out
