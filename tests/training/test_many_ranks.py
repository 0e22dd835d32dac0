"""One to eight ranks: the same losses without dropout, and with any dropout the same samples in each step."""

import json
from functools import cache
from pathlib import Path

import pytest

from sora_hw.data.dataset import sample_order, split
from sora_hw.data.records import read_records

LAUNCHERS = Path(__file__).resolve().parents[2] / "launchers"
STEPS, BATCH, MICRO, SEED, HELD_OUT = 4, 16, 2, 11, 5

# The launcher, whose ranks write down the samples that they take out of the training data, in a file for each.
NOTING = f"""
import json, os, sys
sys.path.insert(0, {str(LAUNCHERS)!r})
import before_torch
from torch.utils.data import Dataset
from sora_hw.recipes import commonsense
from sora_hw.training import launch, run, trainer

class Noting(Dataset):
    def __init__(self, samples, order):
        self.samples, self.order = samples, order
        self.file = open(os.environ["NOTES"] + os.environ["RANK"], "w", buffering=1)
    def __len__(self):
        return len(self.order)
    def __getitem__(self, place):
        self.file.write(self.samples.ids[self.order[place]] + "\\n")
        return self.samples[self.order[place]]

trainer.Subset = Noting
sys.exit(launch.main(commonsense))
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    file = tmp_path_factory.mktemp("noting") / "noting.py"
    file.write_text(NOTING)
    return file


@pytest.fixture(scope="module")
def run(program, tmp_path_factory, tiny_model, records_file, launch):
    """`run(ranks, dropout)` gives the losses and, of every step, the ids of its samples."""

    def start(ranks, dropout):
        folder = tmp_path_factory.mktemp("run")
        words = ["--model", tiny_model, "--train-data", records_file, "--output", folder / "out"]
        words += ["--max-steps", STEPS, "--global-batch", BATCH, "--micro-batch", MICRO, "--seed", SEED]
        words += ["--validation-size", HELD_OUT, "--max-length", 320, "--dropout", dropout, "--warmup-steps", 1]
        words += ["--learning-rate", 5e-3, "--rank", 4, "--eval-steps", 100]
        done = launch(ranks, *words, launcher=program, NOTES=f"{folder}/rank")
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        history = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
        losses = [entry["loss"] for entry in history if "loss" in entry]
        share = BATCH // ranks
        taken = [Path(f"{folder}/rank{rank}").read_text().split() for rank in range(ranks)]
        steps = [sorted(id for ids in taken for id in ids[s * share : (s + 1) * share]) for s in range(STEPS)]
        return losses, steps

    return cache(start)


@pytest.fixture(scope="module")
def wanted(records_file):
    """The ids of every step, by the recipe's order."""
    records, _ = split(read_records([records_file]), HELD_OUT, SEED)
    order = sample_order(len(records), STEPS * BATCH, SEED)
    return [sorted(records[i].id for i in order[s * BATCH : (s + 1) * BATCH]) for s in range(STEPS)]


# Eight on two cores take long.
@pytest.mark.parametrize("ranks", [2, 4, pytest.param(8, marks=pytest.mark.full)])
def test_the_same_losses_and_samples(ranks, run, wanted):
    alone, steps_alone = run(1, 0)
    losses, steps = run(ranks, 0)
    assert steps_alone == wanted and steps == wanted
    assert len(alone) == STEPS and len(set(alone)) == STEPS
    assert losses == pytest.approx(alone, abs=5e-5)


def test_dropout_changes_losses_and_no_samples(run, wanted):
    two, steps = run(2, 0.3)
    assert steps == wanted
    without, _ = run(2, 0)
    assert two != pytest.approx(without, abs=5e-5)
