"""Reading the frozen weight of a base layer: as it is stored, gathered where ZeRO-3 has sharded it, and its norm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn


class ReadsBaseWeight(BaseTunerLayer):
    """A layer around a base layer whose weight it reads, stored as (in, out) where `fan_in_fan_out` says so."""

    fan_in_fan_out: bool
    _norm_squared: tuple[object, Tensor] | None = None

    def _stored_weight(self) -> Tensor:
        """`W0` as (out, in), a view of the stored weight."""
        weight = self.get_base_layer().weight
        return weight.t() if self.fan_in_fan_out else weight

    def _base_dtype(self) -> torch.dtype:
        return self.get_base_layer().weight.dtype

    def _weight_is_readable(self) -> bool:
        """Whether the whole weight lies there as a plain floating tensor: neither quantised nor sharded."""
        weight = self.get_base_layer().weight
        return weight.is_floating_point() and is_whole(weight)

    @contextmanager
    def _base_weight(self) -> Iterator[Tensor]:
        """`W0` as (out, in) for reading, gathered where ZeRO-3 has sharded it."""
        weight = self.get_base_layer().weight
        if not weight.is_floating_point():
            raise ValueError("a magnitude needs the norm of the base weight, which a quantised layer does not give")
        # Inside a forward pass DeepSpeed has gathered it at this very access, and frees it itself.
        gathered = not hasattr(weight, "ds_id") or weight.numel() == weight.ds_numel
        with nullcontext() if gathered else gather_params_ctx([weight], modifier_rank=None):
            yield self._stored_weight().detach()

    def _base_norm_squared(self, weight: Tensor) -> Tensor:
        """`||W0||^2` of every row, (out,), computed once and kept until the weight changes.

        A change is noticed unless it is written into the frozen weight through `.data`.
        """
        stored = self.get_base_layer().weight
        kept = self._norm_squared
        if torch.compiler.is_compiling():  # where neither address nor version can be read
            serves = kept is not None and kept[1].device == weight.device and not stored.requires_grad
            return kept[1] if serves else row_norm_squared(weight)
        if stored.is_inference():
            return row_norm_squared(weight)
        held = getattr(stored, "ds_tensor", stored)  # under ZeRO-3 this rank's part, the only thing that lasts
        key = (held.data_ptr(), held._version, weight.device)
        if kept is None or kept[0] != key or stored.requires_grad:
            self._norm_squared = (key, row_norm_squared(weight))
        return self._norm_squared[1]


def is_whole(t: Tensor) -> bool:
    """Whether a parameter lies there whole and as a plain tensor: neither quantised nor sharded."""
    return type(t) in (Tensor, nn.Parameter) and not hasattr(t, "ds_id")  # the mark of ZeRO-3


def adapter_dtype(base: torch.dtype) -> torch.dtype:
    """Adapters train in float32, beside a float64 base in float64."""
    return torch.promote_types(base, torch.float32) if base.is_floating_point else torch.float32


def row_norm_squared(weight: Tensor) -> Tensor:
    """`||W0||^2` of every row, (out,), in the adapter's dtype."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=adapter_dtype(weight.dtype)).square()
