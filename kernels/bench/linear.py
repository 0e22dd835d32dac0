"""One adapted linear layer against its peers, every peer in one run; the frozen layer is 1.0.

    python kernels/bench/linear.py [--device cpu|cuda] [--passes both forward backward inference] [--dtypes ...]
                                   [--shapes 4096x14336 block ...] [--rows ...] [--ranks ...] [--rotation-ranks ...]
                                   [--[no-]compiled] [--json FILE] [--chart FILE]

Without options: on a processor N = 2048 and 512, in = out = 2048, one thread; on a GPU the shapes of LLaMA3-8B and
`block`, the seven layers of one of its blocks in turn, in the grid of `GPU` below. `--compiled` adds the compilation of
every layer in every case, which takes far longer than the rest. Two threads on a shared machine would measure its
scheduler. The rows rotate over several buffers, so that no pass meets its input in a cache where training would not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from chart import draw
from peers import FROZEN, adapted_linears
from rich.console import Console
from rich.table import Table
from timing import Step, medians
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PASSES = ("both", "forward", "backward", "inference")
BUFFERS = 4
# LLaMA3-8B: q and o, k and v, gate and up, down.
SHAPES = ["4096x4096", "4096x1024", "4096x14336", "14336x4096"]
BLOCK = [0, 1, 1, 0, 2, 2, 3]  # q, k, v, o, gate, up, down
GPU = {
    "shapes": [*SHAPES, "block"],
    "rows": [512, 2048, 8192],
    "dtypes": ["bfloat16"],
    "passes": ["both", "forward", "backward"],
    "ranks": [16],
    "rotation_ranks": [1],
    "compiled": False,
}
CPU = {
    "shapes": ["2048x2048"],
    "rows": [2048, 512],
    "dtypes": ["float32", "bfloat16"],
    "passes": ["both"],
    "ranks": [16],
    "rotation_ranks": [1],
    "compiled": False,
}


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    console = Console()
    console.print(f"{hardware(arguments.device)}, torch {torch.__version__}, peft {peft.__version__}")
    results = []
    cases = itertools.product(
        arguments.dtypes, arguments.shapes, arguments.ranks, arguments.rotation_ranks, arguments.passes
    )
    for dtype, shape, rank, rotation_rank, what in cases:
        case = {"dtype": dtype, "shape": shape, "rank": rank, "rotation_rank": rotation_rank, "pass": what}
        columns = [{**case, "rows": rows, **measure(case, rows, arguments)} for rows in arguments.rows]
        show(columns, console)
        results += columns
        if arguments.json:  # after every case: a long run may be broken off
            machine = {"hardware": hardware(arguments.device), "torch": torch.__version__, "peft": peft.__version__}
            arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")
    if arguments.chart:
        draw(
            {f"{r['shape']}, N {r['rows']}": r["ratios"] for r in results if r["ratios"]},
            "time, frozen linear = 1",
            arguments.chart,
        )


def measure(case: dict, rows: int, arguments: argparse.Namespace) -> dict:
    """Ratios of one case, and the frozen layer's milliseconds; none of either where memory does not suffice."""
    try:
        return ratios(case, rows, arguments)
    except torch.OutOfMemoryError:
        return {"ratios": {}, "frozen_milliseconds": None}


def ratios(case: dict, rows: int, arguments: argparse.Namespace) -> dict:
    torch.compiler.reset()  # the graphs of one case would count against the next one's
    shapes = [SHAPES[index] for index in BLOCK] if case["shape"] == "block" else [case["shape"]]
    parts = [steps_of(shape, case, rows, arguments) for shape in shapes]

    def in_turn(name: str) -> Step:
        def step() -> Callable[[], object]:
            timed = [part[name]() for part in parts]
            return lambda: [run() for run in timed]

        return step

    steps = {name: in_turn(name) for name in parts[0]}
    found, frozen = medians(steps, arguments.repeats, torch.device(arguments.device))
    return {"ratios": found, "frozen_milliseconds": frozen}


def steps_of(shape: str, case: dict, rows: int, arguments: argparse.Namespace) -> dict[str, Step]:
    """The case's pass over one layer, of every peer."""
    inputs, outputs = map(int, shape.split("x"))
    device, dtype = torch.device(arguments.device), DTYPES[case["dtype"]]
    torch.manual_seed(0)
    modules = adapted_linears(inputs, outputs, case["rank"], case["rotation_rank"], dtype, device, arguments.compiled)
    buffers = [
        (
            torch.randn(rows, inputs, dtype=dtype, device=device, requires_grad=True),
            torch.randn(rows, outputs, dtype=dtype, device=device),
        )
        for _ in range(BUFFERS)
    ]
    return {name: STEPS[case["pass"]](module, buffers) for name, module in modules.items()}


Buffers = list[tuple[Tensor, Tensor]]


def both(module: nn.Module, buffers: Buffers) -> Step:
    turns = itertools.cycle(buffers)

    def step() -> Callable[[], None]:
        x, dy = next(turns)
        x.grad = None
        module.zero_grad(set_to_none=True)
        return lambda: module(x).backward(dy)

    return step


def forward(module: nn.Module, buffers: Buffers) -> Step:
    turns = itertools.cycle(buffers)

    def step() -> Callable[[], Tensor]:
        x, _ = next(turns)
        return lambda: module(x)

    return step


def backward(module: nn.Module, buffers: Buffers) -> Step:
    """The backward pass alone; each is of a forward pass of its own, which is not timed."""
    turns = itertools.cycle(buffers)

    def step() -> Callable[[], None]:
        x, dy = next(turns)
        x.grad = None
        module.zero_grad(set_to_none=True)
        y = module(x)
        return lambda: y.backward(dy)

    return step


def inference(module: nn.Module, buffers: Buffers) -> Step:
    turns = itertools.cycle(buffers)
    module.eval()

    def step() -> Callable[[], Tensor]:
        x, _ = next(turns)
        return lambda: without_gradients(module, x)

    return step


def without_gradients(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module(x)


STEPS: dict[str, Callable[[nn.Module, Buffers], Step]] = {
    "both": both,
    "forward": forward,
    "backward": backward,
    "inference": inference,
}


def show(columns: list[dict], console: Console) -> None:
    case = columns[0]
    title = (
        f"{case['pass']}, {case['dtype']}, {case['shape']}, r {case['rank']}, rp {case['rotation_rank']}; {FROZEN} = 1"
    )
    table = Table(title=title)
    table.add_column("peer")
    for column in columns:
        table.add_column(f"N {column['rows']}", justify="right")
    for name in dict.fromkeys(name for column in columns for name in column["ratios"]):
        table.add_row(name, *(shown(column["ratios"].get(name)) for column in columns))
    table.add_row("frozen, milliseconds", *(shown(column["frozen_milliseconds"]) for column in columns))
    console.print(table)


def shown(value: float | None) -> str:
    return "out of memory" if value is None else f"{value:.3f}"


def hardware(device: str) -> str:
    if device != "cpu":
        return torch.get_device_module(device).get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {torch.get_num_threads()} thread(s)"


def parse() -> argparse.Namespace:
    found = torch.accelerator.current_accelerator(check_available=True)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=found.type if found else "cpu")
    parser.add_argument("--passes", nargs="+", choices=PASSES)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--shapes", nargs="+", help="in x out, as 4096x1024")
    parser.add_argument("--rows", type=int, nargs="+", help="tokens N")
    parser.add_argument("--ranks", type=int, nargs="+")
    parser.add_argument("--rotation-ranks", type=int, nargs="+")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, help="ours under torch.compile as well")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=11, help="rounds, after two to warm up")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--chart", type=Path, help="draw them here, as PNG or SVG")
    arguments = parser.parse_args()
    for name, default in (CPU if arguments.device == "cpu" else GPU).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
    return arguments


if __name__ == "__main__":
    main()
