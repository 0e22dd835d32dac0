"""A finished run's adapter merged into its base model: a plain model, which needs neither PEFT nor this library."""

from pathlib import Path

import torch

from sora_hw.adapter import ConditionedLinear
from sora_hw.errors import UserError
from sora_hw.finished.adapters import (
    NAME,
    Rounding,
    check_untied,
    find_adapter,
    new_folder,
    open_adapter,
    save_tokenizer,
)
from sora_hw.terminal import Console


def merge(path: Path, output: Path, model: str | None, console: Console) -> None:
    """Write the plain model, rounded once to the dtype of the base model's files, with its tokenizer to `output`.

    Args:
        path: folder of a run or of an adapter, of this library or of PEFT's own methods.
        output: a folder that does not exist.
        model: the base model, where another is meant than the one that was trained on.

    Raises UserError for what cannot be merged, and leaves nothing behind.
    """
    with new_folder(output) as folder:
        adapter = find_adapter(path, model)
        with console.status(f"loading {adapter.base.name}"):
            adapted = open_adapter(adapter)
        check_untied(adapted)
        dtype, rounding = adapted.get_base_model().dtype, Rounding()
        with console.status("merging"):
            if dtype.itemsize < 4:
                _count(adapted, rounding)
            try:
                plain = adapted.merge_and_unload(safe_merge=True)
            except ValueError as error:  # not finite, or a method that cannot be merged
                raise UserError(f"{path}: the adapter cannot be merged ({error})") from None
        with console.status(f"writing {output}"):
            plain.save_pretrained(folder)
            has_tokenizer = save_tokenizer(adapter, folder)
    told = [f"{output}: {adapter.base.name} with the adapter merged into its weights", *rounding.told(dtype)]
    if not has_tokenizer:
        told.append("no tokenizer: neither the adapter nor the base model has one")
    console.print("\n".join(told))


@torch.no_grad()
def _count(adapted: torch.nn.Module, rounding: Rounding) -> None:
    for layer in adapted.modules():
        if isinstance(layer, ConditionedLinear):
            weight, _ = layer._conditioned_values(NAME, layer._live_values())
            rounding.add(layer._stored_weight(), weight)
