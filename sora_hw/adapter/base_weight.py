"""Reading the frozen weight of a base layer: as it is stored, gathered where ZeRO-3 has sharded it, and what is kept
of it: the norm of its rows, and the product of a rotation's directions with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn


class KeptProduct(NamedTuple):
    """`Q^T W0` of one adapter and what it came from: `Q`, and the states of the parameters and of the weight."""

    value: Tensor
    q: Tensor
    state: object


class ReadsBaseWeight(BaseTunerLayer):
    """A layer around a base layer whose weight it reads, stored as (in, out) where `fan_in_fan_out` says so."""

    fan_in_fan_out: bool
    kept_products: dict[str, KeptProduct]
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

    def _product_with_base(self, adapter_name: str, q: Tensor, parameters: Iterable[Tensor]) -> Tensor:
        """`Q^T W0`, (k, in), of an adapter's `q` (out, k), in the dtype of the weight, which must be readable.

        It costs a read of the whole weight, so it is kept where it can be known, without waiting for the device, to be
        the same: on the processor by comparing `q`; elsewhere in the recomputation of a checkpointed forward pass,
        since parameters may not change before its backward pass is over. Versions alone would not tell: DeepSpeed and
        moving averages write into parameters through `.data`.
        """
        weight = self._stored_weight()
        if torch.compiler.is_compiling() or weight.requires_grad or not (_can_be_kept(q) and _can_be_kept(weight)):
            return q.t().to(weight.dtype) @ weight
        kept, state = self.kept_products.get(adapter_name), tensor_states([weight, *parameters])
        if kept is not None and kept.state == state and (torch.equal(kept.q, q) if q.is_cpu else _in_backward()):
            return _Kept.apply(q, weight, kept.value)
        product = q.t().to(weight.dtype) @ weight
        self.kept_products[adapter_name] = KeptProduct(product.detach(), q.detach(), state)
        return product


class _Kept(torch.autograd.Function):
    """`value = q^T W0` without computing it, with the gradient of `q`."""

    @staticmethod
    def forward(ctx, q, weight, value):
        ctx.save_for_backward(weight)
        ctx.dtype = q.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return (weight @ gradient.t()).to(ctx.dtype), None, None


def tensor_states(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Changes with the tensors' values, unless they are written through `.data`."""
    return [(t.data_ptr(), t._version) for t in tensors]


def _can_be_kept(t: Tensor) -> bool:
    """Whether a tensor has values and a version: neither a stand-in without values nor of inference mode."""
    return type(t) in (Tensor, nn.Parameter) and not t.is_inference()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def is_whole(t: Tensor) -> bool:
    """Whether a parameter lies there whole and as a plain tensor: neither quantised nor sharded."""
    return type(t) in (Tensor, nn.Parameter) and not hasattr(t, "ds_id")  # the mark of ZeRO-3


def adapter_dtype(base: torch.dtype) -> torch.dtype:
    """Adapters train in float32, beside a float64 base in float64."""
    return torch.promote_types(base, torch.float32) if base.is_floating_point else torch.float32


def row_norm_squared(weight: Tensor) -> Tensor:
    """`||W0||^2` of every row, (out,), in the adapter's dtype."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=adapter_dtype(weight.dtype)).square()
