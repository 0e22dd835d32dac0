"""The base model: where it is, whether the recipe fits its layers, and loading it."""

import importlib.util
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from sora_hw import recipes
from sora_hw.data.embedded import MODEL_PATH
from sora_hw.errors import UserError
from sora_hw.hardware import Profile
from sora_hw.recipes.recipe import EMBEDDED, FULL, Recipe
from sora_hw.storage import check_regular, read_json, sampled_checksum
from sora_hw.training.methods import is_expression
from sora_hw.training.objectives import Objective

SHIPPED = Path(recipes.__file__).parent / "models"  # the configurations of the paper's models, without their weights
SAFE, PICKLED, INDEX = "model.safetensors", "pytorch_model.bin", ".index.json"  # as transformers looks for weights
DESCRIBED_IN = ("*.json", "*.txt", "*.model")  # configuration, vocabulary, merges, a tokenizer of SentencePiece
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class Headed(Protocol):
    """What decides a model's head: an objective, for one.

    Attributes:
        auto_class: transformers' class that gives a model the head.
        model_options: values for the model's configuration.
    """

    auto_class: type
    model_options: Mapping[str, object]


@dataclass(frozen=True)
class BaseModel:
    """A model that was found: its name as given, what transformers loads it from, its configuration, and the class that
    gives it the objective's head."""

    name: str
    source: str
    config: PretrainedConfig
    auto_class: type


def find(name: str, objective: Headed) -> BaseModel:
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
        return _found(name, name, objective)
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise UserError(f"--model {name}: the folder holds an adapter, not a model; name the model it belongs to")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise UserError(f"--model {name}: the folder holds no weights (*.safetensors)")
    return _found(name, str(folder), objective)


def shipped(name: str, objective: Headed) -> BaseModel | None:
    """One of the paper's models to be planned with: its configuration alone, which comes with this package."""
    folder = SHIPPED / name.rpartition("/")[2]
    return _found(name, str(folder), objective) if folder.is_dir() else None


def _found(name: str, source: str, objective: Headed) -> BaseModel:
    return BaseModel(name, source, _config(name, source, objective.model_options), objective.auto_class)


def is_local(name: str) -> bool:
    """Whether `name` means a folder rather than an id of the hub ("model" or "owner/model")."""
    path = Path(name).expanduser()
    return name == EMBEDDED or path.exists() or not HUB_ID.fullmatch(name) or ("/" in name and path.parent.is_dir())


def _config(name: str, source: str, options: Mapping[str, object]) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # from the hub, the network and every model's own checks: all mean the same here
        where = "no model configuration" if Path(source).is_dir() else "no such folder, and the hub cannot give it"
        raise UserError(f"--model {name}: {where} ({_first_sentence(error)})") from None


def _first_sentence(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def check_model(base: BaseModel, recipe: Recipe) -> int | None:
    """Check the model's weights and that the recipe's adapter fits its layers.

    The model is built without memory on torch's meta device. Raises UserError when a file of weights is damaged or
    belongs to another model, a target names no layer, or a rank is larger than a layer.

    Returns:
        The number of elements of the adapter's largest tensor; None where the whole model trains.
    """
    model = skeleton(base)
    _check_files(base)
    _check_weights(base, {name: tuple(each.shape) for name, each in model.state_dict().items()})
    if recipe.method == FULL:
        return None
    for name in recipe.modules_to_save:
        if not name or not any(_names(name, each) for each, _ in model.named_modules()):
            known = ", ".join(name for name, _ in model.named_children())
            raise UserError(
                f"--modules-to-save {name}: {base.name} has no layer of this name; outermost it has {known}"
            )
    largest = 0
    for target in recipe.target_modules:
        layers = targeted(model, target)
        if not layers:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear_layers(model)}))
            raise UserError(f"--target-modules {target}: no linear layer of {base.name} has this name; it has {known}")
        for name, layer in layers.items():
            shape = _shape(layer)
            if recipe.low_rank:
                _check_rank("--rank", recipe.rank, name, shape)
                _check_rank("--rotation-rank", recipe.rotation_rank, name, shape)
            largest = max(largest, max(shape) * max(recipe.rank, recipe.rotation_rank))
    return largest


def skeleton(base: BaseModel) -> PreTrainedModel:
    """The model without memory, on torch's meta device. Raises UserError where it has not the objective's head."""
    try:
        with torch.device("meta"):
            return base.auto_class.from_config(base.config, trust_remote_code=False)
    except Exception as error:  # as in _config
        kind = base.auto_class.__name__.removeprefix("AutoModelFor")
        raise UserError(f"--model {base.name}: not a model for {kind} ({_first_sentence(error)})") from None


def targeted(model: nn.Module, target: str) -> dict[str, nn.Linear | Conv1D]:
    """The linear layers that a target means, by their full names."""
    return {name: layer for name, layer in linear_layers(model).items() if _names(target, name)}


def linear_layers(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """The linear layers by their full names, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def _names(target: str, layer: str) -> bool:
    """Whether a target means the layer of this full name, as PEFT has it."""
    if is_expression(target):
        try:
            return re.fullmatch(target, layer) is not None
        except re.error as error:
            raise UserError(f"--target-modules {target}: neither a name nor a regular expression ({error})") from None
    return layer == target or layer.endswith("." + target)


def _check_files(base: BaseModel) -> None:
    """The files that transformers takes the weights of a local model from are in its folder, whatever its index or its
    config.json names: a path from a stranger leads nowhere else. Raises UserError."""
    folder = Path(base.source)
    if not folder.is_dir():  # the hub's client looks after its own
        return
    for name in _files(base, folder):
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"--model {base.name}: {name!r}, which it names for its weights, is no file in its folder")


def _files(base: BaseModel, folder: Path) -> list[object]:
    """Their names, as they are written: a stranger's may be anything."""
    name = getattr(base.config, "transformers_weights", None)
    if name is None:
        usual = (SAFE, SAFE + INDEX, PICKLED, PICKLED + INDEX)
        name = next((each for each in usual if (folder / each).is_file()), SAFE)
    if not (isinstance(name, str) and name.endswith(INDEX) and (folder / name).is_file()):
        return [name]
    try:
        index = read_json(folder / name)
        dict(index["metadata"])
        return [name, *index["weight_map"].values()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"--model {base.name}: {name} is damaged; fetch it again") from None


def _check_weights(base: BaseModel, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """The safetensors files of a local model: each is whole, and its tensors have the shapes of the configuration."""
    for file in sorted(Path(base.source).glob("*.safetensors")):
        try:
            check_regular(file)
            with safe_open(file, framework="pt") as weights:
                found = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"--model {base.name}: {file.name} is damaged ({_first_sentence(error)}); fetch it again"
            ) from None
        packed = getattr(base.config, "quantization_config", None) is not None
        for name in () if packed else found.keys() & shapes.keys():
            if found[name] != shapes[name]:
                raise UserError(
                    f"--model {base.name}: {name} in {file.name} is {_times(found[name])}, but by config.json it is "
                    f"{_times(shapes[name])}: they belong to different models"
                )


def identity(base: BaseModel) -> str:
    """What tells the model from others of the same shapes, which a run could not go on with: a checksum of samples of
    the files of its weights, its configuration and its tokenizer; of a model on the hub, its commit."""
    if Path(base.source).is_dir():
        return sampled_checksum(Path(base.source), "*.safetensors", "*.bin", *DESCRIBED_IN)
    return str(getattr(base.config, "_commit_hash", None))


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def check_fused_loss(base: BaseModel) -> None:
    """Raises UserError where Liger is missing or would leave the model as it is, which the Trainer only logs."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError("--fused-loss needs Liger: pip install 'sora_hw[cuda]', or use --no-fused-loss")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if base.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(f"--fused-loss: Liger does not know {base.config.model_type} models; use --no-fused-loss")


def check_tokens(base: BaseModel, largest_token: int, longest: int) -> None:
    """Raises UserError when the model has no embedding for a token of the data, or too few positions for a sample."""
    vocabulary = getattr(base.config, "vocab_size", None)
    if vocabulary is not None and largest_token >= vocabulary:
        raise UserError(
            f"--model {base.name}: its tokenizer gives token {largest_token}, but the model knows {vocabulary}: "
            "they belong to different models"
        )
    positions = getattr(base.config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise UserError(
            f"a sample of {longest} tokens is longer than the {positions} positions of {base.name}: "
            f"give --max-length {positions}"
        )


def _shape(module: nn.Module) -> tuple[int, int]:
    rows, columns = module.weight.shape
    return rows, columns


def _check_rank(flag: str, rank: int, name: str, shape: tuple[int, int]) -> None:
    if rank > max(shape):
        raise UserError(f"{flag} {rank} is larger than the layer {name} of {shape[0]} x {shape[1]}; use a smaller one")


def load_tokenizer(base: BaseModel, objective: Objective) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the right. Raises UserError when it is missing or lacks what it needs."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.source, trust_remote_code=False)
    except Exception as error:  # as in _config
        raise UserError(f"--model {base.name}: no usable tokenizer ({_first_sentence(error)})") from None
    if objective.ends_texts and tokenizer.eos_token_id is None:
        raise UserError(f"--model {base.name}: its tokenizer has no end-of-text token")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"--model {base.name}: its tokenizer has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token  # masked out everywhere, so any token serves
    tokenizer.padding_side = "right"
    return tokenizer


def load_model(base: BaseModel, profile: Profile, **placement: object) -> PreTrainedModel:
    """The model with its weights; sharded while it is loaded where ZeRO-3 has been configured before.

    placement: where other than in memory, as transformers takes it (`device_map`, `offload_folder`).

    Raises UserError when its files cannot be loaded.
    """
    options: dict[str, object] = {"dtype": getattr(torch, profile.dtype), **placement}
    if profile.four_bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=options["dtype"]
        )
    return _load(base, options)


def load_as_stored(base: BaseModel) -> PreTrainedModel:
    """The model in the dtype of its files, in host memory. Raises UserError when they cannot be loaded."""
    return _load(base, {"dtype": "auto"})


def _load(base: BaseModel, options: Mapping[str, object]) -> PreTrainedModel:
    logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
    _check_files(base)
    try:
        return base.auto_class.from_pretrained(base.source, config=base.config, trust_remote_code=False, **options)
    except UnpicklingError:
        raise UserError(f"--model {base.name}: its pickled weights are damaged, or hold more than tensors") from None
    except Exception as error:  # every format fails in its own ways at what a file may hold
        raise UserError(f"--model {base.name}: its weights cannot be loaded ({_first_sentence(error)})") from None
