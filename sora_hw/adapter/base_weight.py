"""Reading the frozen weight of a base layer: as it is stored, gathered where ZeRO-3 or FSDP has sharded it, and what is
kept of it: the norm of its rows, and the product of a rotation's directions with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn

from sora_hw.adapter.quantised import check_readable
from sora_hw.ops import Probe


class KeptProduct(NamedTuple):
    """`Q^T W0` of one adapter and what it came from: weight, states of the parameters, and on the processor `Q`."""

    value: Tensor
    weight: KeptWeight
    parameters: object
    q: Tensor | None


class KeptWeight(NamedTuple):
    """What shows, without waiting for the device, that a frozen weight is still the one that something was made from.

    Its address and version, which a write through `.data` leaves as they are; so on the processor some of its values
    too. A write through `.data` on another device, or to none of these values, is not seen.
    """

    address: int
    version: int
    device: torch.device
    sample: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, held: Tensor) -> KeptWeight:
        """Of a weight (out, in), `held` where it lasts: under ZeRO-3 that is this rank's part."""
        rows, columns = (1 + size // 16 for size in weight.shape)
        sample = weight.detach()[::rows, ::columns].clone() if weight.is_cpu else None
        return cls(held.data_ptr(), held._version, weight.device, sample)

    def is_same(self, other: KeptWeight) -> bool:
        return self[:3] == other[:3] and (self.sample is None or torch.equal(self.sample, other.sample))


class ReadsBaseWeight(BaseTunerLayer):
    """A layer around a base layer whose weight it reads, stored as (in, out) where `fan_in_fan_out` says so."""

    fan_in_fan_out: bool
    kept_products: dict[str, KeptProduct]
    _norm_squared: Tensor | None = None
    _norm_source: KeptWeight | None = None

    def _forget_base(self) -> None:
        """Drop what is kept of the weight, which has been or will be written into."""
        self._norm_squared = self._norm_source = None
        self.kept_products.clear()

    def _as_matrix(self, stored: Tensor) -> Tensor:
        """A weight as the base layer stores it as (out, in), a view."""
        return stored.t() if self.fan_in_fan_out else stored

    def _as_stored(self, matrix: Tensor) -> Tensor:
        """The inverse of `_as_matrix`, for any number of rows."""
        return matrix.t() if self.fan_in_fan_out else matrix

    def _stored_weight(self) -> Tensor:
        """`W0` as (out, in), a view of the stored weight."""
        return self._as_matrix(self.get_base_layer().weight)

    def _base_bias(self) -> Tensor | None:
        """`b0`, (out,), or None; an embedding has none to ask for."""
        return getattr(self.get_base_layer(), "bias", None)

    @property
    def _is_quantised(self) -> bool:
        return self.quantization_backend is not None or is_quantised(self.get_base_layer().weight)

    def _base_dtype(self) -> torch.dtype:
        return torch.float32 if self._is_quantised else self.get_base_layer().weight.dtype

    def _weight_is_readable(self) -> bool:
        """Whether the whole weight lies there as a plain floating tensor: neither quantised nor sharded."""
        return not self._is_quantised and is_whole(self.get_base_layer().weight)

    @contextmanager
    def _base_weight(self) -> Iterator[Tensor]:
        """`W0` as (out, in) for reading, gathered where ZeRO-3 or FSDP has sharded it."""
        if self._is_quantised:
            check_readable(self, "a magnitude or a sum of adapters")
            yield self.get_base_weight().detach()
            return
        weight = self.get_base_layer().weight
        # Inside a forward pass DeepSpeed has gathered it at this very access, and frees it itself.
        is_there = not hasattr(weight, "ds_id") or weight.numel() == weight.ds_numel
        with nullcontext() if is_there else gather_params_ctx([weight], modifier_rank=None):
            yield self._as_matrix(gathered(weight)).detach()

    def _base_norm_squared(self, weight: Tensor) -> Tensor:
        """`||W0||^2` of every row, (out,), computed once and kept until the weight changes.

        A change of the frozen weight is noticed as far as `KeptWeight` tells.
        """
        stored = self.get_base_layer().weight
        kept = self._norm_squared
        if torch.compiler.is_compiling():  # where neither address nor version can be read
            serves = kept is not None and kept.device == weight.device and not stored.requires_grad
            return kept if serves else row_norm_squared(weight)
        if stored.is_inference():
            return row_norm_squared(weight)
        now = KeptWeight.of(weight, getattr(stored, "ds_tensor", stored))
        if kept is None or not self._norm_source.is_same(now) or stored.requires_grad:
            self._norm_squared, self._norm_source = row_norm_squared(weight), now
        return self._norm_squared

    def _probe(self, adapter_name: str, q: Tensor, parameters: Iterable[Tensor]) -> Probe:
        """What reads a rotation off the input, of an adapter's `q` (out, k) and the weight, which must be readable.

        `Q^T W0` costs a read of the whole weight, so it is kept where it can be known, without waiting for the device,
        to be the same: on the processor by comparing `q`; elsewhere in the recomputation of a checkpointed forward pass
        of training, since parameters may not change before its backward pass is over. Versions alone would not tell:
        DeepSpeed and moving averages write into parameters through `.data`.
        """
        weight = self._stored_weight()
        with torch.no_grad():
            return Probe(q, weight, self._product_with_base(adapter_name, q.detach(), weight, parameters))

    def _product_with_base(self, adapter_name: str, q: Tensor, weight: Tensor, parameters: Iterable[Tensor]) -> Tensor:
        unknown = torch.compiler.is_compiling() or weight.requires_grad or not (_has_values(q) and _has_values(weight))
        if unknown or not (q.is_cpu or self.training):
            return q.t().to(weight.dtype) @ weight
        kept = self.kept_products.get(adapter_name)
        source, states = KeptWeight.of(weight, weight), tensor_states(parameters)
        same = kept is not None and kept.weight.is_same(source) and kept.parameters == states
        if same and (torch.equal(kept.q, q) if q.is_cpu else in_backward()):
            return kept.value
        value = q.t().to(weight.dtype) @ weight
        self.kept_products[adapter_name] = KeptProduct(value, source, states, q if q.is_cpu else None)
        return value


def tensor_states(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Changes with the tensors' values, unless they are written through `.data`."""
    return [(t.data_ptr(), t._version) for t in tensors]


def _has_values(t: Tensor) -> bool:
    """Whether a tensor has values and a version: neither a stand-in without values nor of inference mode."""
    return type(t) in (Tensor, nn.Parameter) and not t.is_inference()


def in_backward() -> bool:
    """Whether the autograd engine is running, as in the recomputation of a checkpointed forward pass."""
    return torch._C._current_graph_task_id() != -1


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is packed. Its dtype alone does not say: bitsandbytes packs four bits into floats, too."""
    return hasattr(weight, "quant_state") or not weight.is_floating_point()


def is_whole(t: Tensor) -> bool:
    """Whether a parameter lies there whole and as a plain tensor: neither quantised nor sharded."""
    return type(t) in (Tensor, nn.Parameter) and not hasattr(t, "ds_id")  # the mark of ZeRO-3


def is_fsdp_shard(t: Tensor) -> bool:
    """Whether FSDP, or whoever else spreads tensors over ranks as a DTensor, has sharded it at this moment."""
    return hasattr(t, "full_tensor")


def gathered(t: Tensor) -> Tensor:
    """The whole of what FSDP may have sharded; all ranks must ask for it."""
    return t.full_tensor() if is_fsdp_shard(t) else t


def check_no_fsdp_shard(t: Tensor, purpose: str) -> None:
    """Raises ValueError for a sharded tensor."""
    if is_fsdp_shard(t):
        raise ValueError(
            f"{purpose} does not work on a model that FSDP has sharded: save the adapter, load it into a whole model "
            "and do it there"
        )


def adapter_dtype(base: torch.dtype) -> torch.dtype:
    """Adapters train in float32, beside a float64 base in float64."""
    return torch.promote_types(base, torch.float32) if base.is_floating_point else torch.float32


def row_norm_squared(weight: Tensor) -> Tensor:
    """`||W0||^2` of every row, (out,), in the adapter's dtype."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=adapter_dtype(weight.dtype)).square()
