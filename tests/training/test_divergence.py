"""A loss that is not finite stops a run before anything is learned from it, and is traced to records and layer."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sora_hw.data.dataset import sample_order
from sora_hw.training.divergence import Diverged, check_finite, trace

MICRO, RANKS, BATCH = 2, 2, 8
BAD = 11  # the record with a tilde


@pytest.fixture
def files(tmp_path, tiny_model):
    """A base model whose embedding of a tilde is broken, and records of which one has a tilde."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    weights = load_file(model / "model.safetensors")
    tilde = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]["~"]
    weights["model.embed_tokens.weight"][tilde] = float("inf")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    records = [
        {"instruction": "~" if number == BAD else "Think.", "output": "yes", "answer": "yes", "id": f"even/{number}"}
        for number in range(24)
    ]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    return ["--model", model, "--train-data", tmp_path / "records.jsonl"]


@pytest.mark.parametrize(
    ("stage", "seed", "micro_step"), [(2, 0, 1), (2, 9, 0), pytest.param(3, 0, 1, marks=pytest.mark.full)]
)
def test_it_names_step_rank_layer_and_record(tmp_path, files, launch, stage, seed, micro_step):
    place = sample_order(24, 24, seed).index(BAD)
    step, rank = place // BATCH + 1, place // MICRO % RANKS
    assert place // MICRO // RANKS % 2 == micro_step
    assert step == 2, "there is something to go on from"
    folder = tmp_path / "run"
    sizes = ["--global-batch", BATCH, "--micro-batch", MICRO, "--max-steps", 3, "--save-steps", 1, "--seed", seed]
    done = launch(2, "--output", folder, *files, *sizes, "--validation-size", 0, "--zero-stage", stage)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert line.startswith(
        f"error: the loss of step {step} is nan on rank {rank}, first in model.embed_tokens, with the records "
        f"even/{BAD}: the run has stopped before it learned from them, and no adapter was saved"
    )
    assert json.loads((folder / "run.json").read_text())["status"] == "diverged"
    assert (folder / f"checkpoint-{step - 1}").exists() and not (folder / "adapter").exists()
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, step)), "how it went is kept"


def test_gradients_that_are_not_finite_end_a_run_too(tmp_path, tiny_model, records_file, launch):
    """Of a finite loss: so large a scale stands before a zero."""
    folder = tmp_path / "run"
    data = ["--model", tiny_model, "--train-data", records_file, "--validation-size", 0]
    sizes = ["--global-batch", 8, "--max-steps", 2, "--save-steps", 1, "--method", "lora", "--alpha", 1e38]
    done = launch(0, "--output", folder, *data, *sizes)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and line.startswith("error: the gradients of step 1 are not finite, though its loss is")
    assert json.loads((folder / "run.json").read_text())["status"] == "diverged"
    assert not [entry for entry in folder.iterdir() if entry.name.startswith(("adapter", "checkpoint-"))]


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Sequential(nn.Identity(), nn.Linear(2, 2))

    def forward(self, values):
        return {"logits": self.second(self.first(values))}


def test_the_innermost_layer_and_only_its_samples():
    model, values = Layers(), torch.ones(3, 4, 2)
    values[1, 2, 0] = 1e38  # finite, until it is multiplied
    with torch.no_grad():
        model.first.weight.fill_(1)
        model.second[1].weight.fill_(1e3)
    found = trace(model, {"values": values}, ["a", "b", "c"])
    assert found.layer == "second.1" and found.records == ["b"]
    assert not any(module._forward_hooks for module in model.modules())
    values[1, 2, 0] = 1
    assert trace(model, {"values": values}, ["a", "b", "c"]).layer is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_saved_nowhere(value):
    check_finite("layer", torch.ones(3))
    with pytest.raises(Diverged, match="layer is no longer finite"):
        check_finite("layer", torch.tensor([1.0, value]))
