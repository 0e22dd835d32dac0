"""A loss that is not finite any more: which records and which layer it came from, told before anything is learned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sora_hw.errors import UserError

SHOWN = 8  # records of a line


class Diverged(UserError):
    """The loss is no longer finite."""


@dataclass(frozen=True)
class Trace:
    """What one rank found: the records of its micro-batch whose loss cannot be finite, and the first module whose
    output is not; None where a second forward pass was finite."""

    records: Sequence[str]
    layer: str | None


def explain(model: nn.Module, inputs: Mapping[str, Tensor], records: Sequence[str], loss: Tensor, step: int) -> str:
    """One line on why the loss of `step` is not finite.

    Every rank must call it: under ZeRO-3 a forward pass needs all of them. `records` are the ids of the samples of this
    rank's `inputs`, `loss` is this rank's, a scalar.
    """
    here = None if torch.isfinite(loss) else trace(model, inputs, records)
    if here is None:
        forward(model, inputs)
    found: list[tuple[float, Trace] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, here and (loss.item(), here))
    rank, (value, first) = next((rank, each) for rank, each in enumerate(found) if each)
    records_shown = ", ".join(first.records[:SHOWN]) + (", ..." if len(first.records) > SHOWN else "")
    place = f"first in {first.layer}" if first.layer else "though the same forward pass, repeated, was finite"
    advice = (
        "look at these records, or try a smaller --learning-rate or more --warmup-steps"
        if first.layer
        else "suspect this rank's device"
    )
    return (
        f"the loss of step {step} is {value} on rank {rank}, {place}, with the records {records_shown}: the run has "
        f"stopped before it learned from them, and no adapter was saved; {advice}"
    )


def trace(model: nn.Module, inputs: Mapping[str, Tensor], records: Sequence[str]) -> Trace:
    """Repeat the forward pass and see where a number first is not finite, and in which samples of the batch."""
    first: list[tuple[str, Tensor]] = []

    def look(name: str):
        def hook(module: nn.Module, given: object, output: object) -> None:
            tensor = _first_tensor(output)
            if not first and tensor is not None and not torch.isfinite(tensor).all():
                first.append((name, tensor.detach()))

        return hook

    # Modules inside others end first: the first to tell is the innermost.
    hooks = [module.register_forward_hook(look(name or "the model")) for name, module in model.named_modules()]
    try:
        forward(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if not first:
        return Trace(records, None)
    layer, output = first[0]
    if output.ndim and len(output) == len(records):
        bad = (~torch.isfinite(output)).flatten(1).any(1).tolist()
        records = [record for record, is_bad in zip(records, bad, strict=True) if is_bad]
    return Trace(records, layer.removeprefix("module.").removeprefix("base_model.model."))


def forward(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        model(**inputs)


def _first_tensor(output: object) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return next((found for each in output if (found := _first_tensor(each)) is not None), None)
    return None


def check_finite(name: str, weights: Tensor) -> None:
    """Raises Diverged for what no checkpoint and no adapter may hold."""
    if not torch.isfinite(weights).all():
        raise Diverged(
            f"{name} is no longer finite: the run has diverged since its last checkpoint, and nothing of it was saved; "
            "try a smaller --learning-rate, or more --warmup-steps"
        )
