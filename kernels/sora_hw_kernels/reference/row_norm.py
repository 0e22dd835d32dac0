"""The norm of the rows of a scaled weight plus a low-rank update, without the dense sum."""

import torch
from torch import Tensor


def factored_row_norm(weight: Tensor, norm_squared: Tensor, scale: Tensor | None, b: Tensor, a: Tensor) -> Tensor:
    """(out,); see `sora_hw.ops.factored_row_norm`. The products run in the weight's dtype, the sums in float32."""
    dtype = norm_squared.dtype
    cross = torch.nn.functional.linear(a.to(weight.dtype), weight).to(dtype).t()
    b, a = b.to(dtype), a.to(dtype)
    squares = (b @ (a @ a.t()) * b).sum(1)
    if scale is None:
        squares += norm_squared + 2 * (cross * b).sum(1)
    else:
        squares += scale.square() * norm_squared + 2 * scale * (cross * b).sum(1)
    # Rounding can leave a vanishing row slightly below zero; its norm is zero then, not NaN.
    return squares.clamp_(min=0).sqrt_()
