"""Which inputs the kernels take, and in which shapes: what every device's launches share."""

import torch
from torch import Tensor

# One tile of the rank dimension: `tl.dot` needs at least 16.
RANK_TILES = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rank_tile(rank: int, largest: int) -> int:
    """The smallest tile that holds the rank, or the largest there is."""
    return next((tile for tile in RANK_TILES if rank <= tile <= largest), largest)


def taken(rows: Tensor, *coefficients: Tensor | None) -> bool:
    """Whether the kernels take these inputs: rows of a dtype of `DTYPES`, every coefficient in float32."""
    return rows.dtype in DTYPES and all(t is None or t.dtype == torch.float32 for t in coefficients)


def with_unit_columns(t: Tensor) -> Tensor:
    """`t` with its last dimension contiguous; rows may lie any stride apart, so slices are not copied."""
    return t if t.stride(-1) == 1 else t.contiguous()
