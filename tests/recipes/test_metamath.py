"""The recipe's values are the paper's."""

from dataclasses import asdict

from sora_hw.recipes import metamath

PAPER = {  # Table "Recipes" and its text
    "model": "google/gemma-7b",
    "method": "sora",
    "target_modules": ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
    "rank": 16,
    "alpha": 32,
    "rotation_rank": 2,
    "dropout": 0.05,
    "train_data": ("meta-math/MetaMathQA",),
    "records": 14_000,
    "validation_size": 1_400,
    "global_batch": 128,
    "max_length": 512,
    "epochs": 2,
    "max_steps": 192,
    "warmup_steps": 8,
    "schedule": "cosine",
    "beta1": 0.9,
    "beta2": 0.999,
}


def test_the_paper_recipe():
    recipe = asdict(metamath.recipe())
    assert {name: recipe[name] for name in PAPER} == PAPER


def test_the_grid_chooses_among_the_paper_s_learning_rates():
    grid = metamath.grid()
    assert (grid.learning_rates, grid.ranks, len(grid.seeds)) == ((2e-4, 4e-4, 6e-4), (16,), 1)
    assert metamath.recipe().learning_rate in grid.learning_rates
    assert grid.validation_size == metamath.recipe().validation_size, "no run on all records is needed"
