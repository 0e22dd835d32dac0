"""The base model: where it is, whether the recipe fits its layers, and loading it."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from sora_hw.data.embedded import MODEL_PATH
from sora_hw.errors import UserError
from sora_hw.recipes.recipe import Recipe

EMBEDDED = "embedded"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class BaseModel:
    """A model that was found: its name as given, what transformers loads it from, and its configuration."""

    name: str
    source: str
    config: PretrainedConfig


def find(name: str) -> BaseModel:
    """The model called `name`: "embedded", a folder, or an id on the Hugging Face hub.

    Raises UserError when the folder does not exist or holds no model, or the hub cannot give the id.
    """
    if name == EMBEDDED:
        folder = MODEL_PATH
    elif is_local(name):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise UserError(f"--model {name}: no such folder")
    else:
        return BaseModel(name, name, _config(name, name))
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise UserError(f"--model {name}: the folder holds no weights (*.safetensors)")
    return BaseModel(name, str(folder), _config(name, str(folder)))


def is_local(name: str) -> bool:
    """Whether `name` means a folder rather than an id of the hub ("model" or "owner/model")."""
    path = Path(name).expanduser()
    return name == EMBEDDED or path.exists() or not HUB_ID.fullmatch(name) or ("/" in name and path.parent.is_dir())


def _config(name: str, source: str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # from the hub, the network and every model's own checks: all mean the same here
        where = "no model configuration" if Path(source).is_dir() else "no such folder, and the hub cannot give it"
        raise UserError(f"--model {name}: {where} ({_first_sentence(error)})") from None


def _first_sentence(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def check_targets(base: BaseModel, recipe: Recipe) -> int:
    """Check that the recipe's adapter fits the model's layers; the number of elements of its largest tensor.

    The model is built without memory on torch's meta device. Raises UserError when a target names no layer or a rank
    is larger than a layer.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(base.config, trust_remote_code=False)
    except ValueError as error:
        raise UserError(f"--model {base.name}: not a causal language model ({_first_sentence(error)})") from None
    layers = {name: _shape(module) for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    largest = 0
    for target in recipe.target_modules:
        shapes = {name: shape for name, shape in layers.items() if name == target or name.endswith("." + target)}
        if not shapes:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise UserError(f"--target-modules {target}: no linear layer of {base.name} has this name; it has {known}")
        for name, shape in shapes.items():
            _check_rank("--rank", recipe.rank, name, shape)
            _check_rank("--rotation-rank", recipe.rotation_rank, name, shape)
            largest = max(largest, max(shape) * max(recipe.rank, recipe.rotation_rank))
    return largest


def _shape(module: nn.Module) -> tuple[int, int]:
    rows, columns = module.weight.shape
    return rows, columns


def _check_rank(flag: str, rank: int, name: str, shape: tuple[int, int]) -> None:
    if rank > max(shape):
        raise UserError(f"{flag} {rank} is larger than the layer {name} of {shape[0]} x {shape[1]}; use a smaller one")


def load_tokenizer(base: BaseModel) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the right. Raises UserError when it is missing or cannot end a text."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.source, trust_remote_code=False)
    except Exception as error:  # as in _config
        raise UserError(f"--model {base.name}: no usable tokenizer ({_first_sentence(error)})") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {base.name}: its tokenizer has no end-of-text token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked out everywhere, so any token serves
    tokenizer.padding_side = "right"
    return tokenizer


def load_model(base: BaseModel, dtype: str) -> PreTrainedModel:
    """The model with its weights; sharded while it is loaded where ZeRO-3 has been configured before."""
    logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
    return AutoModelForCausalLM.from_pretrained(base.source, dtype=getattr(torch, dtype), trust_remote_code=False)
