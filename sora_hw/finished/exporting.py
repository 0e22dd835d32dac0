"""A finished run's adapter as an exact plain LoRA: for PEFT without this library, and for servers of LoRAs."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.utils import load_peft_weights
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from sora_hw.adapter import ConditionedConfig, ConditionedLinear
from sora_hw.adapter.export import layer_as_lora, lora_tensors
from sora_hw.adapter.starting import STARTS
from sora_hw.errors import UserError
from sora_hw.finished.adapters import (
    NAME,
    WEIGHTS,
    Adapter,
    Rounding,
    check_untied,
    find_adapter,
    new_folder,
    open_adapter,
    save_tokenizer,
    shown,
)
from sora_hw.terminal import Console
from sora_hw.training.run_folder import MODEL

_PREFIX = "base_model.model."  # of every name in an adapter's file
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank may be
# All fields that a LoRA's configuration has as well mean the same there, but for these.
_NOT_THE_SAME = {
    "peft_type",
    "peft_version",
    "r",
    "bias",
    "use_rslora",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
}


@dataclass
class _Lora:
    """An adapter as a LoRA.

    Attributes:
        tensors: by the names that they have in PEFT's file of a LoRA.
        ranks: of every layer.
        scaled: the layers whose diagonal now lies in the weight of the base model.
        biased: those whose conditioned bias now lies there.
        started: those that have given a part of their weight to the adapter when it was made.
        rounding: what the base model's dtype takes from the diagonals.
    """

    tensors: dict[str, Tensor]
    ranks: dict[str, int] = field(default_factory=dict)
    scaled: list[str] = field(default_factory=list)
    biased: list[str] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    rounding: Rounding = field(default_factory=Rounding)

    @property
    def folds(self) -> bool:
        """Whether it belongs to a base model of its own."""
        return bool(self.scaled or self.biased or self.started)


def export(path: Path, output: Path, model: str | None, console: Console) -> None:
    """Write the LoRA to `output` and, where the adapter has a diagonal, a magnitude or a conditioned bias, the base
    model with that folded into it to `output`/model; tell what was folded.

    Args:
        path: folder of a run or of an adapter.
        output: a folder that does not exist.
        model: the base model, where another is meant than the one that was trained on.

    Raises UserError for what is no adapter of this library, and leaves nothing behind.
    """
    with new_folder(output) as folder:
        adapter = find_adapter(path, model)
        if not isinstance(adapter.config, ConditionedConfig):
            kind = adapter.config.peft_type.value
            raise UserError(f"{path}: an adapter of PEFT's own ({kind}), which every PEFT loads as it is")
        with console.status(f"loading {adapter.base.name}"):
            adapted = open_adapter(adapter)
        dtype = adapted.get_base_model().dtype
        if adapter.config.conditioning.scales or adapter.config.condition_bias or adapter.config.init_weights in STARTS:
            check_untied(adapted)
        lora = _as_lora(adapter, adapted, console)
        config = _lora_config(adapted, lora)
        if lora.folds:
            with console.status(f"writing {output / MODEL}"):
                adapted.unload().save_pretrained(folder / MODEL)
                save_tokenizer(adapter, folder / MODEL)
            config.base_model_name_or_path, config.revision = str((output / MODEL).absolute()), None
        else:
            config.base_model_name_or_path = adapter.base.source
        save_file(lora.tensors, folder / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(folder))
        told = _statement(adapter, lora, config, output, dtype)
        (folder / "README.md").write_text(_card(told))
    console.print("\n".join(told))


@torch.no_grad()
def _as_lora(adapter: Adapter, adapted: PeftModel, console: Console) -> _Lora:
    """Every layer's LoRA. What is folded is written into the base layers; with that the adapter itself is void."""
    saved = load_peft_weights(str(adapter.folder), device="cpu")
    lora = _Lora({name: tensor for name, tensor in saved.items() if not re.search(r"\.conditioned_\w+$", name)})
    named = adapted.get_base_model().named_modules()
    layers = [(name, module) for name, module in named if isinstance(module, ConditionedLinear)]
    for name, layer in track(layers, "layers", console=console, transient=True, disable=not console.is_terminal):
        exact, base = layer_as_lora(layer, NAME), layer.get_base_layer()
        try:
            tensors = lora_tensors(layer, exact)
        except ValueError as error:
            raise UserError(f"{adapter.folder}: {name} is {error}; `merge` writes the model with it") from None
        if not all(torch.isfinite(tensor).all() for tensor in exact if tensor is not None):
            raise UserError(f"{adapter.folder}: what it makes of {name} is not finite; the adapter seems to be broken")
        lora.ranks[name] = len(exact.a)
        lora.tensors |= {f"{_PREFIX}{name}.{key}": tensor for key, tensor in tensors.items()}
        if layer.starts_from_base is not None:
            lora.started.append(name)  # `open_adapter` has taken the adapter's start out of the weight
        if exact.weight is not None:
            lora.scaled.append(name)
            lora.rounding.add(layer._stored_weight(), exact.weight)
            base.weight.copy_(layer._as_stored(exact.weight))
            lora.tensors.pop(f"{_PREFIX}{name}.base_layer.weight", None)  # PEFT saves adapted embeddings whole
        if exact.bias is not None:
            lora.biased.append(name)
            base.bias.copy_(exact.bias)
            lora.tensors.pop(f"{_PREFIX}{name}.base_layer.bias", None)  # it was trained; the base model has it now
    return lora


def _lora_config(adapted: PeftModel, lora: _Lora) -> LoraConfig:
    """The configuration under which PEFT gives every layer its rank and the scale one."""
    ours = adapted.peft_config[NAME]
    known = {each.name for each in fields(LoraConfig)} - _NOT_THE_SAME
    same = {each.name: getattr(ours, each.name) for each in fields(ours) if each.name in known}
    rank = max(lora.ranks.values())
    others = {f"^{re.escape(name)}": each for name, each in lora.ranks.items() if each != rank}
    layers = [module for module in adapted.modules() if isinstance(module, ConditionedLinear)]
    return LoraConfig(
        **same,
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=dict(others),
        bias=ours.bias.replace("conditioned_only", "lora_only"),
        fan_in_fan_out=all(layer.fan_in_fan_out for layer in layers),
    )


def _statement(adapter: Adapter, lora: _Lora, config: LoraConfig, output: Path, dtype: torch.dtype) -> list[str]:
    """What was written, what was folded, and how to load it, in lines."""
    base = config.base_model_name_or_path
    told = [f"{output}: {len(lora.ranks)} layers as a LoRA of rank {config.r}, which is exact"]
    if lora.folds:
        parts = [(lora.scaled, "the diagonal"), (lora.biased, "the bias"), (lora.started, "the start")]
        folded = " and ".join(f"{what} of {len(names)} layers" for names, what in parts if names)
        told.append(f"folded into a copy of {adapter.base.name}: {folded}")
        told += lora.rounding.told(dtype)
        told.append(f"the LoRA belongs to that copy alone, {base} ({shown(dtype)})")
    else:
        told.append(f"nothing is folded: it belongs to {adapter.base.name} as that is")
    loader = adapter.base.auto_class.__name__
    told.append(f'PEFT: PeftModel.from_pretrained({loader}.from_pretrained("{base}"), "{output}")')
    told.append(_for_vllm(lora, config, output))
    return told


def _for_vllm(lora: _Lora, config: LoraConfig, output: Path) -> str:
    """Whether vLLM takes the LoRA, and how."""
    rank = next((rank for rank in _VLLM_RANKS if rank >= config.r), None)
    others = [
        name
        for name, tensor in lora.tensors.items()
        if ".lora_" not in name or tensor.dim() != 2 or "_embedding_" in name
    ]
    if others or rank is None:
        return "vLLM: not as a LoRA, of which it takes linear layers alone, up to rank 512; `sora-hw merge` serves it"
    options = f"--enable-lora --max-lora-rank {rank} --lora-modules {output.name}={output}"
    return f"vLLM: vllm serve {config.base_model_name_or_path} {options}"


def _card(told: list[str]) -> str:
    """The model card of the folder."""
    head = "---\nlibrary_name: peft\ntags:\n- lora\n---\nA plain LoRA, made by sora_hw from a conditioned adapter.\n"
    return "\n".join([head, *(f"- {line}" for line in told), ""])
