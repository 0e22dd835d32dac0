"""The recipe's values are the paper's, for every task."""

from dataclasses import asdict

import pytest

from sora_hw.data.glue import TASKS
from sora_hw.recipes import glue

PAPER = {  # Table "Recipes" and its text
    "model": "microsoft/deberta-v3-base",
    "method": "sora",
    "rank": 16,
    "alpha": 32,
    "rotation_rank": 1,
    "dropout": 0.0,
    "train_data": ("nyu-mll/glue",),
    "max_length": 128,
    "epochs": 5,
    "max_steps": None,
    "weight_decay": 0.01,
}


@pytest.mark.parametrize("task", TASKS)
def test_the_paper_recipe(task):
    recipe = asdict(glue.recipe(task))
    assert {name: recipe[name] for name in PAPER} == PAPER
    assert recipe["task"] == task and recipe["name"] == f"glue-{task}"
    assert recipe["global_batch"] == (128 if task == "qqp" else 32)


@pytest.mark.parametrize(("task", "steps"), [("rte", 390), ("mrpc", 575), ("cola", 1340), ("qqp", 14215)])
def test_steps_are_epochs_times_batches(task, steps):
    assert glue.recipe(task).steps(TASKS[task].training_records) == steps


@pytest.mark.parametrize("task", TASKS)
def test_the_grid(task):
    grid = glue.grid(task)
    assert (grid.learning_rates, grid.ranks, len(set(grid.seeds))) == ((1e-3, 8e-4, 4e-4), (16,), 3)
    assert 0 < grid.validation_size <= TASKS[task].training_records / 10
