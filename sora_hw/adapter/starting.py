"""Starting the low-rank part from the base weight: PiSSA (Meng et al. 2024) and OLoRA (Buyukakyuz 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

STARTS = ("pissa", "olora")


def principal_part(weight: Tensor, r: int, scaling: float, start: str) -> tuple[Tensor, Tensor]:
    """`B` (out, r) and `A` (r, in), of which `s B A` is the part of `W0` to train; the base keeps the rest.

    - `pissa`: the `r` largest singular values with their vectors, shared out evenly between `A` and `B`.
    - `olora`: the first `r` columns of `Q` and rows of `R` of `W0 = Q R`, as PEFT's LoRA takes them: `B A` unscaled.

    Args:
        weight: `W0`, (out, in), float32 or float64.
        r: the rank.
        scaling: `s`.
        start: one of `STARTS`.

    Raises:
        ValueError: for a rank above that of the weight.
    """
    if r > min(weight.shape):
        raise ValueError(f"init_weights={start!r} needs r of at most {min(weight.shape)} here, not {r}")
    if start == "olora":
        q, triangle = torch.linalg.qr(weight)
        return q[:, :r], triangle[:r]
    u, values, vt = torch.linalg.svd(weight, full_matrices=False)
    root = (values[:r] / scaling).sqrt()
    return u[:, :r] * root, root[:, None] * vt[:r]
