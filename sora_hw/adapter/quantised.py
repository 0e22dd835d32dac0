"""Quantised base layers: their weight through PEFT's quantisation backends, and what a merge replaces of them."""

from __future__ import annotations

import copy
from typing import NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


class PackedOriginal(NamedTuple):
    """All that a backend may replace when it writes a weight, as it was: restoring it is exact to the bit.

    It stays where it is. A packed weight is small, and moving one to another device would quantise it anew.
    """

    base_layer: nn.Module
    module: nn.Module
    weight: nn.Parameter
    attributes: dict[str, object]
    state: object | None

    @classmethod
    def of(cls, layer: BaseTunerLayer) -> PackedOriginal:
        module = layer.get_base_layer()
        state = copy.copy(getattr(module, "state", None))
        return cls(layer.base_layer, module, module.weight, dict(vars(module.weight)), state)

    def restore(self, layer: BaseTunerLayer) -> None:
        vars(self.weight).update(self.attributes)
        layer.base_layer = self.base_layer
        self.module.weight = self.weight
        if self.state is not None:
            self.module.state = copy.copy(self.state)


def check_readable(layer: BaseTunerLayer, purpose: str) -> None:
    """Raises ValueError where the backend cannot give the weight of a quantised layer, or not any more."""
    backend = layer.quantization_backend
    if backend is None or not backend.supports_merge:
        kind = backend.backend_name if backend else type(layer.get_base_layer()).__name__
        raise ValueError(
            f"{purpose} needs the values of the base weight, which a {kind} layer does not give: "
            "load the base model unquantised"
        )
    quant_state = getattr(layer.get_base_layer().weight, "quant_state", None)
    if getattr(quant_state, "packing_format_for_cpu", False):
        # The processor's fast product has laid the packed weight out anew; what reads it as before reads noise.
        raise ValueError(
            f"{purpose} needs the values of the base weight, which a bnb 4bit layer does not give after it has "
            "computed without gradients on a processor: do it before, or on a GPU"
        )
