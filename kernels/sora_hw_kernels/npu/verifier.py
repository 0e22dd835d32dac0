"""What is registered: looks at the inputs of a call and lets the kernels, the composition or the reference serve it.

The three have the same functions. The reference serves float64, which NPUs do not multiply.
"""

from types import ModuleType

import torch
from torch import Tensor

from sora_hw_kernels.npu import composition, launch
from sora_hw_kernels.reference import row_norm as reference_row_norm
from sora_hw_kernels.reference import scale_rank as reference_scale_rank
from sora_hw_kernels.triton_kernels.inputs import RANK_TILES


def forward(base: Tensor, scale: Tensor | None, z: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """(N, out); see `sora_hw.ops.scale_rank_update`."""
    return serving(base, scale, bias).forward(base, scale, z, b, bias)


def backward(
    grad: Tensor,
    saved: Tensor,
    scale: Tensor | None,
    z: Tensor,
    b: Tensor,
    bias: Tensor | None,
    saved_base: bool,
    need_base: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of base, z, b, scale and bias; see `sora_hw_kernels.reference.scale_rank.backward`."""
    return serving(grad, scale, bias).backward(grad, saved, scale, z, b, bias, saved_base, need_base)


def input_gradient(grad: Tensor, dz: Tensor, a: Tensor, mask: Tensor | None, mask_scale: float) -> Tensor:
    """(N, in); see `sora_hw_kernels.reference.scale_rank.input_gradient`."""
    return serving(grad).input_gradient(grad, dz, a, mask, mask_scale)


def factored_row_norm(weight: Tensor, norm_squared: Tensor, scale: Tensor | None, b: Tensor, a: Tensor) -> Tensor:
    """(out,); see `sora_hw.ops.factored_row_norm`. The reference is a composition over the whole tensor already."""
    fits = b.shape[1] <= RANK_TILES[-1] and weight.stride(1) == 1
    if fits and launch.takes(weight, norm_squared, scale, b, a):
        from sora_hw_kernels.npu import row_norm

        return row_norm.factored_row_norm(weight, norm_squared, scale, b, a)
    return reference_row_norm.factored_row_norm(weight, norm_squared, scale, b, a)


def serving(rows: Tensor, *coefficients: Tensor | None) -> ModuleType:
    """The module whose `forward`, `backward` and `input_gradient` take these rows and coefficients."""
    if rows.dtype == torch.float64:
        return reference_scale_rank
    if launch.takes(rows, *coefficients):
        from sora_hw_kernels.npu import scale_rank  # imports triton, so only where it is there

        return scale_rank
    return composition
