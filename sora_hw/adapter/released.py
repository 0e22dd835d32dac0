"""The layer that the paper's authors released: its tensors as this library's, and its formula.

It computes SORA with the paper's first-order rotation, whose factors it names the other way round, scales and rotates
the bias with the rest, and has a rule of its own for the rotation's size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

TENSORS = ("A", "B", "C", "D", "Diag")  # in a checkpoint `lora_A.weight` and so on
# what makes `ConditionedConfig` that layer
OPTIONS = {"method": "sora", "rotation": "taylor", "rotation_scale": "reference", "condition_bias": True}


def converted(released: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One layer's tensors by the names of `Conditioning.parameter_shapes`, in float32.

    Args:
        released: A (r, in), B (out, r), C and D (out, rp), Diag (out, 1).
    """
    wide = {name: tensor.double() for name, tensor in released.items()}
    ours = {
        "A": wide["A"],
        "B": wide["B"],
        "pre_delta": wide["Diag"].flatten() - 1,
        # its rotation is the transpose of the paper's, so its C is the paper's D
        "post_C": wide["D"],
        "post_E": wide["C"] - wide["D"],
    }
    return {name: tensor.float().contiguous() for name, tensor in ours.items()}


def released_output(
    x: Tensor, weight: Tensor, bias: Tensor | None, released: Mapping[str, Tensor], scaling: float
) -> Tensor:
    """The released layer's output (..., out) of x (..., in), written from its code without anything of this library.

    `u = d (x W0^T + b0) + s x A^T B^T`, and then `u + s_p [(u C) D^T - (u D) C^T]` with
    `s_p = min(1, 1 / (||C||_F + ||D||_F + 1e-6))`.

    Args:
        x: in the dtype to compute in.
        weight: `W0`, (out, in).
        bias: `b0`, (out,), or None.
        released: see `converted`.
        scaling: `s`.
    """
    a, b, c, d, diagonal = (released[name].to(x.dtype) for name in TENSORS)
    u = diagonal[:, 0] * torch.nn.functional.linear(x, weight, bias) + scaling * (x @ a.T) @ b.T
    size = min(1.0, 1.0 / (torch.linalg.norm(c) + torch.linalg.norm(d) + 1e-6).item())
    return u + size * ((u @ c) @ d.T - (u @ d) @ c.T)
