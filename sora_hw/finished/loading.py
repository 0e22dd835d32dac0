"""A finished run's model on a device, to be asked."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from sora_hw.finished.run import FinishedRun
from sora_hw.hardware import Profile
from sora_hw.recipes.recipe import Recipe
from sora_hw.training.base_model import check_model, find, load_model, load_tokenizer
from sora_hw.training.objectives import objective_of
from sora_hw.training.saving import load_trained


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode on its device, with its tokenizer, which pads on the right."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase


def load(recipe: Recipe, run: FinishedRun | None, profile: Profile, device: torch.device) -> Loaded:
    """The base model of `recipe`, with what `run` trained; without `run` the base model alone.

    The adapter is not merged: in a bfloat16 weight most of it would be rounded away.

    Raises UserError for a model that is missing or damaged.
    """
    objective = objective_of(recipe)
    base = find(recipe.model, objective)
    check_model(base, recipe)
    tokenizer = load_tokenizer(base, objective)
    model = load_model(base, profile)
    if run is not None:
        model = load_trained(base, model, run.trained, profile)
    return Loaded(model.to(device).eval(), tokenizer)
