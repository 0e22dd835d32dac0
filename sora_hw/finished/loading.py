"""A finished run's model on a device, to be asked."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from sora_hw.devices.device import Device
from sora_hw.errors import UserError
from sora_hw.finished.run import FinishedRun
from sora_hw.hardware import Profile, choose
from sora_hw.recipes.recipe import FULL, Recipe
from sora_hw.storage import checksum
from sora_hw.training.base_model import check_model, find, load_model, load_tokenizer
from sora_hw.training.objectives import objective_of
from sora_hw.training.run_folder import MANIFEST
from sora_hw.training.saving import ADAPTER_CONFIG, load_trained

WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode on its device, with its tokenizer, which pads on the right."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase


def load(recipe: Recipe, run: FinishedRun | None, profile: Profile, device: torch.device) -> Loaded:
    """The base model of `recipe`, with what `run` trained; without `run` the base model alone.

    The adapter is not merged: in a bfloat16 weight most of it would be rounded away.

    Raises UserError for a model or an adapter that is missing or damaged.
    """
    objective = objective_of(recipe)
    base = find(recipe.model, objective)
    check_model(base, recipe)
    tokenizer = load_tokenizer(base, objective)
    model = load_model(base, profile)
    if run is not None:
        if recipe.method != FULL and not (run.trained / ADAPTER_CONFIG).is_file():
            raise UserError(f"{run.trained}: the adapter is missing (there is no {ADAPTER_CONFIG})")
        model = load_trained(base, model, run.trained, profile)
    return Loaded(model.to(device).eval(), tokenizer)


def profile_for(run: FinishedRun | None, device: Device) -> Profile:
    """How a model is held on `device`: as the run held it, where that was on a device of this type.

    Raises UserError where run.json does not say so as a run does.
    """
    profile = choose("auto", device)
    trained_with = run.manifest.get("profile") if run and run.manifest.get("device") == device.type else None
    if isinstance(trained_with, dict):
        dtype, four_bit = trained_with.get("dtype"), trained_with.get("four_bit")
        if dtype not in ("float32", "bfloat16") or not isinstance(four_bit, bool):
            raise UserError(f"{run.path / MANIFEST} is damaged: its profile does not say how the model was held")
        profile = replace(profile, dtype=dtype, four_bit=four_bit)
    return profile


def weights(recipe: Recipe, run: FinishedRun | None) -> str:
    """SHA-256 of the files that `load` takes weights from, and of the configuration of what was trained, by which an
    adapter acts; of a model on the hub, of its name and commit."""
    parts = []
    if run is None or recipe.method != FULL:
        base = find(recipe.model, objective_of(recipe))
        if Path(base.source).is_dir():
            parts.append(checksum(Path(base.source), *WEIGHTS))
        else:
            parts.append(f"{base.source} {getattr(base.config, '_commit_hash', None)}")
    if run is not None:
        parts.append(checksum(run.trained, *WEIGHTS, "*config.json"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
