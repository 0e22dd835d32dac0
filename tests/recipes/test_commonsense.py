"""The recipe's values are the paper's, the embedded one differs only where it says so, and wrong values are named."""

from dataclasses import asdict, fields, replace

import pytest

from sora_hw.errors import UserError
from sora_hw.recipes import commonsense
from sora_hw.recipes.recipe import Recipe

PAPER = {  # Table "Recipes" and its text
    "model": "meta-llama/Meta-Llama-3-8B",
    "method": "sora",
    "target_modules": ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
    "rank": 16,
    "alpha": 32,
    "rotation_rank": 1,
    "dropout": 0.05,
    "global_batch": 128,
    "max_length": 512,
    "epochs": 5,
    "max_steps": 588,
    "warmup_steps": 20,
    "learning_rate": 4e-4,
    "schedule": "cosine",
    "beta1": 0.9,
    "beta2": 0.999,
}


def test_the_paper_recipe():
    recipe = asdict(commonsense.recipe())
    assert {name: recipe[name] for name in PAPER} == PAPER


def test_the_embedded_recipe_keeps_the_method():
    paper, embedded = asdict(commonsense.recipe()), asdict(commonsense.embedded())
    changed = {name for name in paper if paper[name] != embedded[name]}
    sized = {"max_length", "learn", "validation_size", "global_batch", "max_steps", "warmup_steps", "learning_rate"}
    assert embedded["model"] == "embedded" and changed <= {"model", "train_data", "save_steps", "eval_steps"} | sized


def test_every_value_has_a_group_and_a_help_for_the_launcher():
    assert all(field.metadata["group"] and field.metadata["help"] for field in fields(Recipe) if field.name != "name")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "--rank 0: must be at least 1"),
        ({"rotation_rank": -1}, "--rotation-rank -1: must be at least 1"),
        ({"alpha": 0.0}, "--alpha 0.0: must be above 0"),
        ({"dropout": 1.0}, "--dropout 1.0: must be below 1"),
        ({"learning_rate": float("inf")}, "--learning-rate inf: must be a finite number"),
        ({"method": "polar"}, "--method polar: choose one of lora, "),
        ({"max_steps": 0}, "--max-steps 0: must be at least 1"),
        ({"target_modules": ()}, "--target-modules: give at least one"),
        ({"keep_best": True, "eval_steps": 3}, "--keep-best needs"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_wrong_values_are_named(change, message):
    with pytest.raises(UserError) as error:
        replace(commonsense.recipe(), **change)
    assert str(error.value).startswith(message)
