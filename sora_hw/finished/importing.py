"""A checkpoint of the authors' released code as an adapter of this library, checked against their formula."""

import copy
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from pickle import UnpicklingError

import torch
from peft import LoraConfig
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sora_hw.adapter import ConditionedConfig, ConditionedLinear
from sora_hw.adapter.released import OPTIONS, TENSORS, converted, released_output
from sora_hw.errors import UserError
from sora_hw.finished.adapters import NAME, WEIGHTS, find_base, new_folder
from sora_hw.storage import read_json
from sora_hw.terminal import Console
from sora_hw.training.base_model import load_as_stored
from sora_hw.training.saving import ADAPTER_CONFIG

LARGEST_DIFFERENCE = 1e-5  # of the largest output; what is written is float32
_TENSOR = re.compile(rf"(?P<layer>.+)\.lora_(?P<name>{'|'.join(TENSORS)})\.weight")
_PREFIX = "base_model.model."
_ROWS = 16  # of the random input

Layers = dict[str, dict[str, Tensor]]  # of every layer, its tensors by their names in `TENSORS`


def import_checkpoint(path: Path, output: Path, model: str | None, console: Console) -> None:
    """Write the adapter to `output`, and prove that its layers' outputs are those of the authors' formula.

    The proof takes random inputs, and the weights of `model` or of the folder that the checkpoint names as its base
    model; random ones where there is neither.

    Raises UserError for what is no such checkpoint, and leaves nothing behind.
    """
    with new_folder(output) as folder:
        theirs = _read_config(path)
        layers, others = _read_tensors(path)
        config = _config(path, theirs, layers)
        ours = {
            f"{layer}.conditioned_{name}": tensor
            for layer, released in layers.items()
            for name, tensor in converted(released).items()
        }
        save_file(others | ours, folder / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(folder))
        base, whose = _weights(config, folder, model)
        worst = _worst_difference(load_file(folder / WEIGHTS), config, layers, base)
    ranks = f"rank {config.r}, rotation of rank {config.rotation_rank}"
    console.print(
        f"{output}: SORA of {len(layers)} layers, {ranks}, as the authors' code has it\n"
        f"its outputs differ from the authors' formula by at most {worst:.1e} of the largest one, on random inputs and "
        f"{whose} (computed in float64)"
    )


def _read_config(path: Path) -> dict[str, object]:
    file = path / ADAPTER_CONFIG
    if not file.exists():
        raise UserError(f"{path}: no checkpoint there (it has no {ADAPTER_CONFIG})")
    try:
        theirs = dict(read_json(file))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{file} is damaged") from None
    if theirs.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type {theirs.get('peft_type')}, but the released code writes LORA")
    for name in ("use_dora", "rank_pattern", "alpha_pattern"):
        if theirs.get(name):
            raise UserError(f"{file}: the released layer knows no {name}, so this is no checkpoint of it")
    return theirs


def _read_tensors(path: Path) -> tuple[Layers, dict[str, Tensor]]:
    """Those of the released layers by layer, and all others."""
    if not any((path / name).is_file() for name in (WEIGHTS, "adapter_model.bin")):
        raise UserError(f"{path}: no weights there ({WEIGHTS} or adapter_model.bin)")
    try:
        tensors = load_peft_weights(str(path), device="cpu")  # of a pickle only tensors, whatever else it holds
    except (OSError, SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: its weights are damaged, or hold more than tensors ({reason})") from None
    layers: Layers = {}
    for name in list(tensors):
        if found := _TENSOR.fullmatch(name):
            layers.setdefault(found["layer"], {})[found["name"]] = tensors.pop(name)
    if not any("Diag" in layer for layer in layers.values()):
        raise UserError(f"{path}: no lora_Diag in it; a plain LoRA needs no import, PEFT loads it as it is")
    for layer, found in layers.items():
        if missing := [name for name in TENSORS if name not in found]:
            raise UserError(f"{path}: {layer} has no lora_{missing[0]}.weight")
    return layers, tensors


def _config(path: Path, theirs: Mapping[str, object], layers: Layers) -> ConditionedConfig:
    """The adapter's configuration; the rank of the rotation is told by the tensors alone."""
    r, rp = theirs.get("r"), next(iter(layers.values()))["C"].shape[-1]
    for layer, found in layers.items():
        out = found["B"].shape[0]
        wanted = {"A": (r, found["A"].shape[-1]), "B": (out, r), "C": (out, rp), "D": (out, rp), "Diag": (out, 1)}
        for name, shape in wanted.items():
            if tuple(found[name].shape) != shape:
                raise UserError(
                    f"{path}: {layer}.lora_{name}.weight is {tuple(found[name].shape)}, where {shape} is expected"
                )
    lora = {each.name for each in fields(LoraConfig)} - {"peft_type", "peft_version", "r", "bias", "use_rslora"}
    same = {each.name: theirs[each.name] for each in fields(ConditionedConfig) if each.name in lora & theirs.keys()}
    try:
        return ConditionedConfig(
            **same,
            **OPTIONS,
            r=r,
            alpha=theirs["lora_alpha"],
            dropout=theirs.get("lora_dropout", 0.0),
            rotation_rank=rp,
            bias=str(theirs.get("bias", "none")).replace("lora_only", "conditioned_only"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path / ADAPTER_CONFIG} is damaged ({error})") from None


def _weights(config: ConditionedConfig, folder: Path, model: str | None) -> tuple[nn.Module | None, str]:
    """The model to prove it on, where there is one, and whose weights these are."""
    named = config.base_model_name_or_path
    if model is None and not (named and Path(named).is_dir()):
        return None, "random weights of the layers' shapes; --model proves it on those of the base model"
    base = find_base(folder, config, model)
    return load_as_stored(base), f"the weights of {base.name}"


@torch.no_grad()
def _worst_difference(
    saved: Mapping[str, Tensor], config: ConditionedConfig, layers: Layers, model: nn.Module | None
) -> float:
    """The largest difference of two outputs over the largest output, of all layers, in float64."""
    torch.manual_seed(0)
    worst = 0.0
    for layer, released in layers.items():
        linear = _linear(layer, released, model)
        ours = ConditionedLinear(linear, NAME, config).eval()
        for name, value in ours.adapter_parameters(NAME).items():
            value.copy_(saved[f"{layer}.conditioned_{name}"])
        x = torch.randn(_ROWS, linear.in_features, dtype=torch.float64)
        theirs = released_output(x, linear.weight, linear.bias, released, config.alpha / config.r)
        worst = max(worst, ((ours(x) - theirs).abs().max() / theirs.abs().max()).item())
    if not worst < LARGEST_DIFFERENCE:
        raise UserError(f"the adapter's outputs differ from the authors' formula by {worst:.1e} of the largest one")
    return worst


def _linear(layer: str, released: Mapping[str, Tensor], model: nn.Module | None) -> nn.Linear:
    """The base layer in float64: that of the model, or a random one with a bias."""
    shape = released["A"].shape[1], released["B"].shape[0]
    if model is None:
        return nn.Linear(*shape, dtype=torch.float64)
    name = layer.removeprefix(_PREFIX)
    try:
        base = model.get_submodule(name)
    except AttributeError:
        raise UserError(f"--model: it has no layer {name}, which the checkpoint adapts") from None
    if not isinstance(base, nn.Linear) or (base.in_features, base.out_features) != shape:
        raise UserError(f"--model: its layer {name} is not a linear one of {shape[0]} to {shape[1]} features")
    return copy.deepcopy(base).double()
