"""Merging: writing conditioned weights into the base layer, and taking them out again bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn

from sora_hw.adapter.base_weight import ReadsBaseWeight, adapter_dtype, check_no_fsdp_shard
from sora_hw.adapter.quantised import PackedOriginal, check_readable
from sora_hw.conditioning import LinearMap, conditioned_bias, conditioned_weight


class _Original(NamedTuple):
    """What a merge overwrote, in host memory, so that unmerging restores it bit for bit.

    Of a quantised layer `weight` is what it stands for, and `packed` is what it was.
    """

    weight: Tensor
    bias: Tensor | None
    packed: PackedOriginal | None = None


class Merges(ReadsBaseWeight):
    """A layer that can write the weight of its adapters into its base layer.

    It has the adapters (`conditioned_A`, `scaling`, `conditions_bias`) and gives their coefficients (`_linear_map`).
    """

    is_linear_layer = True  # rather than a convolution or an embedding
    starts_from_base: str | None = None  # the adapter whose start has been taken out of the base weight

    _original: _Original | None = None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the conditioned weight into the base layer, rounded once from float32.

        The original waits in host memory until `unmerge`.

        Args:
            safe_merge: refuse, leaving the layer as it is, when the merged weight is not finite.
            adapter_names: the adapters to merge; the active ones by default.

        Raises:
            ValueError: for a quantised base layer that does not give its weight, or under `safe_merge` for a weight
                that is not finite.
        """
        names = self._mergeable(adapter_names)
        if not names:
            return
        with self._base_gathered():
            original = self._original or self._copy_to_host()
            self._write_merged(self.merged_adapters + names, original, safe_merge)
        self._original = original
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        self._forget_base()
        with self._base_gathered():
            if self._original.packed is not None:
                self._original.packed.restore(self)
            else:
                base.weight.data.copy_(self._original.weight)
            if self._original.bias is not None:
                base.bias.data.copy_(self._original.bias)
        self._original = None
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer alone, merged if asked. Keeps no copy of the original."""
        names = self._mergeable(adapter_names) if merge else []
        if names:
            with self._base_gathered():
                original = self._original or self._live_values()
                self._write_merged(self.merged_adapters + names, original, safe_merge)
        return self.get_base_layer()

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """`W' - W0` of one adapter in the layout of the stored weight, float32 or wider."""
        if self._is_quantised:
            check_readable(self, "the difference of the weights")
        with torch.no_grad(), self._base_gathered():
            original = self._original or self._live_values()
            weight, linear = self._original_and_map(adapter_name, original)
            # Not as the difference of two weights, which would round away what is small beside them.
            change = torch.zeros_like(weight[:, 0]) if linear.c is None else linear.c - 1
            a, scaling = self.adapter_parameters(adapter_name)["A"], self.scaling[adapter_name]
            return self._as_stored(conditioned_weight(weight, linear._replace(c=change), a, scaling))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's conversion to LoRA takes the difference of the weights of a linear layer from the model's own base."""
        holds_all = not self.conditions_bias[adapter_name] or self._base_bias() is None
        return self.is_linear_layer and holds_all and self.starts_from_base is None

    def _mergeable(self, adapter_names: list[str] | None) -> list[str]:
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.conditioned_A]
        if names and self._is_quantised:
            check_readable(self, "merging")
        return names

    @contextmanager
    def _unmerged_weight(self) -> Iterator[Tensor]:
        """`W0` as (out, in) for reading, whatever is merged into it now."""
        with self._base_weight() as weight:
            yield weight if self._original is None else self._as_matrix(self._original.weight).to(weight.device)

    @contextmanager
    def _unmerged_weight_if_read(self, adapter_names: Iterable[str]) -> Iterator[Tensor | None]:
        """`W0` where the coefficients of one of these adapters or their sum need it, else None."""
        used = [self.conditioning[name] for name in adapter_names]
        needed = any(conditioning.turns or conditioning.post == "magnitude" for conditioning in used)
        with self._unmerged_weight() if needed else nullcontext() as weight:
            yield weight

    def _base_gathered(self):
        base = self.get_base_layer()
        check_no_fsdp_shard(base.weight, "merging, or whatever else writes or compares base weights,")
        bias = self._base_bias()
        return gather_params_ctx([base.weight] if bias is None else [base.weight, bias])

    def _live_values(self) -> _Original:
        bias = self._base_bias()
        return _Original(self.get_base_weight(), None if bias is None else bias.data)

    def _copy_to_host(self) -> _Original:
        weight, bias, _ = self._live_values()
        packed = PackedOriginal.of(self) if self._is_quantised else None
        return _Original(weight.to("cpu", copy=True), None if bias is None else bias.to("cpu", copy=True), packed)

    def _conditioned_values(self, adapter_name: str, original: _Original) -> tuple[Tensor, Tensor | None]:
        """`W'` (out, in) and the bias under one adapter, float32 or wider, on the base layer's device."""
        weight, linear = self._original_and_map(adapter_name, original)
        a, bias = self.adapter_parameters(adapter_name)["A"], original.bias
        if bias is not None:
            bias = bias.to(weight.device, weight.dtype)
            bias = conditioned_bias(bias, linear) if self.conditions_bias[adapter_name] else bias
        return conditioned_weight(weight, linear, a, self.scaling[adapter_name]), bias

    def _original_and_map(self, adapter_name: str, original: _Original) -> tuple[Tensor, LinearMap]:
        """`W0` (out, in), float32 or wider, on the adapter's device, and the coefficients of the adapter on it."""
        p = self.adapter_parameters(adapter_name)
        weight = self._as_matrix(original.weight).to(p["A"].device, adapter_dtype(original.weight.dtype))
        return weight, self._linear_map(adapter_name, p, weight)

    @torch.no_grad()
    def _write_merged(self, names: list[str], original: _Original, safe: bool) -> None:
        """Write the original plus every adapter's difference from it; each is conditioned against the original."""
        values = [self._conditioned_values(name, original) for name in names]
        weight, bias = values[0]
        for more_weight, more_bias in values[1:]:
            weight = weight + (more_weight - self._as_matrix(original.weight).to(weight))
            if bias is not None:
                bias = bias + (more_bias - original.bias.to(bias))
        if safe and not all(torch.isfinite(t).all() for t in (weight, bias) if t is not None):
            broken = f"adapter {names[0]} seems" if len(names) == 1 else f"adapters {', '.join(names)} seem"
            raise ValueError(f"NaNs detected in the merged weights. The {broken} to be broken")
        self._forget_base()
        if self._is_quantised:
            self.set_base_weight(weight.to(original.weight.dtype))
        else:
            self.get_base_layer().weight.data.copy_(self._as_stored(weight))
        if bias is not None:
            self.get_base_layer().bias.data.copy_(bias)
