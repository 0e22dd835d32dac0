"""One adapted linear layer on CPU, every peer in one run, frozen linear = 1.0.

    python kernels/bench/cpu_linear.py [--inference] [--rows 2048 512] [--features 2048] [--threads 1] [--repeats 15]
                                       [--json FILE]

Forward + backward, or with `--inference` the forward pass of unmerged adapters, as in generation.

The peers run in turn, round after round, and each figure is the median over rounds of the ratio to the frozen layer
of the same round: the machine's speed may drift, the ratio does not. With two threads on a shared machine the ratios
measure the scheduler, so one thread is the default.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import sora_hw

RANK, ALPHA = 16, 32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Step = Callable[[], None]


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    results = []
    for dtype in DTYPES:
        for rows in arguments.rows:
            steps = peers(rows, arguments.features, DTYPES[dtype], infer_step if arguments.inference else train_step)
            ratios = measure(steps, arguments.repeats)
            results.append({"dtype": dtype, "rows": rows, "ratios": ratios})
    show(results, arguments)
    if arguments.json:
        machine = {
            "cpu": cpu_name(),
            "threads": arguments.threads,
            "pass": what_runs(arguments),
            "torch": torch.__version__,
            "peft": peft.__version__,
        }
        arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")


def peers(
    rows: int, features: int, dtype: torch.dtype, run: Callable[[nn.Module, Tensor, Tensor], None]
) -> dict[str, Step]:
    """One step of every peer on the same shapes. Dropout 0; adapters as each library makes them by default.

    In bfloat16 PEFT computes a float32 adapter in float32; its all-bfloat16 form, which is faster, runs as well.
    """
    x = torch.randn(rows, features, dtype=dtype, requires_grad=True)
    dy = torch.randn(rows, features, dtype=dtype)

    def step(config=None, **kwargs) -> Step:
        model = nn.Sequential(nn.Linear(features, features, bias=False, dtype=dtype)).requires_grad_(False)
        if config is not None:
            model = get_peft_model(model, config, **kwargs)
            start_from_a_trained_point(model)
        return lambda: run(model, x, dy)

    def peft_lora(**kwargs) -> LoraConfig:
        return LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=["0"], **kwargs)

    def ours(method: str) -> sora_hw.ConditionedConfig:
        return sora_hw.ConditionedConfig(method=method, r=RANK, alpha=ALPHA, dropout=0.0, target_modules=["0"])

    steps = {"frozen linear": step(), "PEFT LoRA": step(peft_lora()), "PEFT DoRA": step(peft_lora(use_dora=True))}
    if dtype != torch.float32:
        steps["PEFT LoRA, bf16 adapter"] = step(peft_lora(), autocast_adapter_dtype=False)
        steps["PEFT DoRA, bf16 adapter"] = step(peft_lora(use_dora=True), autocast_adapter_dtype=False)
    return steps | {f"sora_hw {m}": step(ours(m)) for m in ("lora", "prediag", "dora", "sora")}


def start_from_a_trained_point(model: nn.Module) -> None:
    """Move every trainable parameter a little, so that no peer multiplies by zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))


def train_step(model: nn.Module, x: Tensor, dy: Tensor) -> None:
    x.grad = None
    model.zero_grad(set_to_none=True)
    model(x).backward(dy)


@torch.no_grad()
def infer_step(model: nn.Module, x: Tensor, dy: Tensor) -> None:
    model.eval()(x)


def measure(steps: dict[str, Step], repeats: int) -> dict[str, float]:
    """Median over rounds of each step's time divided by the first step's in the same round."""
    rounds: list[dict[str, float]] = []
    for _ in range(repeats + 2):
        times = {}
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name] = time.perf_counter() - start
        rounds.append(times)
    frozen = next(iter(steps))
    counted = rounds[2:]  # the first two warm up
    return {name: statistics.median(times[name] / times[frozen] for times in counted) for name in steps}


def show(results: list[dict], arguments: argparse.Namespace) -> None:
    console = Console()
    console.print(f"{cpu_name()}, torch {torch.__version__}, peft {peft.__version__}, threads {arguments.threads}")
    for dtype in DTYPES:
        of_dtype = [result for result in results if result["dtype"] == dtype]
        table = Table(title=f"{what_runs(arguments)}, {dtype}, in = out = {arguments.features}, r {RANK}, frozen = 1")
        table.add_column("peer")
        for result in of_dtype:
            table.add_column(f"N {result['rows']}", justify="right")
        for name in of_dtype[0]["ratios"]:
            table.add_row(name, *(f"{result['ratios'][name]:.3f}" for result in of_dtype))
        console.print(table)


def what_runs(arguments: argparse.Namespace) -> str:
    return "forward, inference" if arguments.inference else "forward + backward"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inference", action="store_true", help="the forward pass without gradients alone")
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 512], help="tokens N")
    parser.add_argument("--features", type=int, default=2048, help="in = out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15, help="rounds, after two to warm up")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    return parser.parse_args()


if __name__ == "__main__":
    main()
