"""An adapter as an exact plain LoRA.

`W' = c W0 + B' [s A; Q^T W0]` (`sora_hw.conditioning`) is a LoRA by its second term alone: of rank r, and 2 rp more for
each rotation. A `c` other than one is folded into the weight that the LoRA stands beside, `c W0`: nothing of low rank
holds it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sora_hw.adapter.convolution import ConditionedConvolution
from sora_hw.adapter.embedding import ConditionedEmbedding
from sora_hw.adapter.layer import ConditionedLinear
from sora_hw.conditioning import LinearMap, conditioned_bias, low_rank_rows


class ExactLora(NamedTuple):
    """`W' = weight + b a`, in float64.

    Attributes:
        a: (R, in), with the scale `s` in it, so that the LoRA's own is one.
        b: (out, R).
        weight: `c W0`, (out, in), or None where `W0` stays as it is.
        bias: (out,), where the adapter conditions the base layer's bias, or None.
    """

    a: Tensor
    b: Tensor
    weight: Tensor | None
    bias: Tensor | None


def exact_lora(
    weight: Tensor, bias: Tensor | None, linear: LinearMap, a: Tensor, scaling: float, condition_bias: bool = False
) -> ExactLora:
    """The LoRA that an adapter is, and what must be folded into the base layer beside it.

    Args:
        weight: `W0`, (out, in).
        bias: `b0`, (out,), or None.
        linear: the adapter's coefficients.
        a: `A`, (r, in).
        scaling: `s`.
        condition_bias: whether the adapter scales and rotates the bias as well.
    """
    conditions = condition_bias and bias is not None and (linear.c is not None or linear.q is not None)
    return ExactLora(
        low_rank_rows(weight, linear, a, scaling),
        linear.b,
        None if linear.c is None else linear.c[:, None] * weight,
        conditioned_bias(bias, linear) if conditions else None,
    )


@torch.no_grad()
def layer_as_lora(layer: ConditionedLinear, adapter_name: str) -> ExactLora:
    """One layer's adapter as a LoRA, whose base layer has its original weight, whole and unquantised."""
    weight = layer._stored_weight().double()
    p = {name: value.double() for name, value in layer.adapter_parameters(adapter_name).items()}
    linear = layer._linear_map(adapter_name, p, weight)
    bias = layer._base_bias()
    bias = None if bias is None else bias.double()
    return exact_lora(weight, bias, linear, p["A"], layer.scaling[adapter_name], layer.conditions_bias[adapter_name])


def lora_tensors(layer: ConditionedLinear, lora: ExactLora) -> dict[str, Tensor]:
    """The LoRA's tensors, float32, by the names and in the shapes that PEFT's LoRA gives them beside such a layer.

    Raises:
        ValueError: for a convolution beside which PEFT's LoRA is another one: it knows no dilation, no padding but
            zeros, and shares its filters out among groups in its own way.
    """
    a, b = lora.a.float().contiguous(), lora.b.float().contiguous()
    if isinstance(layer, ConditionedEmbedding):
        return {"lora_embedding_A": a, "lora_embedding_B": b}
    if isinstance(layer, ConditionedConvolution):
        base = layer.get_base_layer()
        if base.groups > 1 or set(base.dilation) != {1} or base.padding_mode != "zeros":
            raise ValueError("a grouped, dilated or otherwise padded convolution: no LoRA of PEFT's equals its adapter")
        a, b = layer._as_stored(a), b.reshape(*b.shape, *[1] * len(base.kernel_size))
    return {"lora_A.weight": a, "lora_B.weight": b}
