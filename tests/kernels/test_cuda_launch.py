"""When a launch of a CUDA kernel compiles it anew, and what it starts: on tensors of the processor, with no kernel."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from sora_hw_kernels.cuda.launch import Launch


class Kernel:
    """Stands for a kernel of Triton's, `f(x, y, N, STRIDE, HAS_Y, TILE)`: keeps what was compiled and started."""

    arg_names = ("x", "y", "N", "STRIDE", "HAS_Y", "TILE")

    def __init__(self):
        self.compiled, self.started = [], []

    def __getitem__(self, grid):
        def compile_and_start(*arguments, **constants):
            self.compiled.append((grid, arguments, constants))
            return Variant(self)

        return compile_and_start


class Variant:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.started.append((grid, arguments))


X, LARGE = torch.zeros(64), 2**31


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (((X, None), (3, 48)), ((X + 1, None), (7, 80)), True),  # other values of the same kinds
        (((X, None), (3, 48)), ((X, X), (3, 48)), False),
        (((X, X), (3, 48)), ((X, X.half()), (3, 48)), False),
        (((X, X), (3, 48)), ((X, X[1:]), (3, 48)), False),  # Triton loads 16 bytes at a time where it may
        (((X, X), (3, 48)), ((X, X[4:]), (3, 48)), True),
        (((X, X), (3, 48)), ((X, X), (1, 48)), False),  # one is a constant to Triton
        (((X, X), (3, 48)), ((X, X), (3, 49)), False),
        (((X, X), (3, 48)), ((X, X), (3, LARGE)), False),
        (((X, X), (3, 48)), ((X, X), (LARGE + 1, 48)), False),
    ],
)
def test_one_variant_for_each_kind_of_arguments(first, second, same):
    kernel = Kernel()
    launch = Launch(kernel, 4, 2, TILE=32, HAS_Y=True)
    for programs, arguments in ((5, first), (6, second)):
        launch(programs, *arguments)
    options = {"TILE": 32, "HAS_Y": True, "num_warps": 4, "num_stages": 2}
    grids = [grid for grid, _, constants in kernel.compiled if constants == options]
    assert grids == ([(5,)] if same else [(5,), (6,)])
    if same:  # with the constants in the order of the parameters
        [(grid, arguments)] = kernel.started
        assert grid == (6, 1, 1) and arguments[2:] == (*second[1], True, 32)
        assert all(given is taken for given, taken in zip(second[0], arguments[:2], strict=True))
