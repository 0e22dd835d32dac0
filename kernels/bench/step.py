"""A training step of a whole model: tokens per second and peak memory of every method, as the paper's Figure 5.

    python kernels/bench/step.py [--device cuda|cpu] [--layers 32] [--micro-batches 1 4] [--checkpointing]
                                 [--memory-gib 24] [--json FILE] [--chart FILE]

A Llama of LLaMA3-8B's shape with random weights in bfloat16, sequences of 512 random tokens, adapters on q, k, v, up
and down (the paper's commonsense recipe, dropout 0), AdamW. One method after the other, each in a model of its own;
what does not fit into memory is said so. `--memory-gib 24` allows no more than an RTX 4090 has. On a processor a small
model of the same kind shows that the program works, no more.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from chart import draw
from linear import hardware
from peers import ALPHA, METHODS, SoraByFormula
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from timing import milliseconds
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import sora_hw

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
LENGTH = 512
LLAMA3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    console = Console()
    console.print(f"{hardware(arguments.device)}, torch {torch.__version__}, {arguments.layers} layers")
    if arguments.memory_gib:
        memory = torch.get_device_module(device)
        memory.set_per_process_memory_fraction(
            arguments.memory_gib * 2**30 / memory.get_device_properties(device).total_memory
        )
    results = []
    for name, adapt in methods(arguments).items():
        for micro_batch in arguments.micro_batches:
            results.append({"method": name, "micro_batch": micro_batch, **measure(adapt, micro_batch, arguments)})
            show(results[-1], console)
    table(results, console)
    if arguments.json:
        machine = {"hardware": hardware(arguments.device), "torch": torch.__version__, "layers": arguments.layers}
        arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")
    if arguments.chart:
        groups = {f"micro-batch {batch}": speeds(results, batch) for batch in arguments.micro_batches}
        draw(groups, "tokens per second", arguments.chart)


def methods(arguments: argparse.Namespace) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """How each method makes a plain model trainable."""

    def lora(**kwargs) -> LoraConfig:
        return LoraConfig(r=arguments.rank, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS, **kwargs)

    def ours(method: str) -> sora_hw.ConditionedConfig:
        options = {"r": arguments.rank, "rotation_rank": arguments.rotation_rank, "alpha": ALPHA, "dropout": 0.0}
        return sora_hw.ConditionedConfig(method=method, target_modules=TARGETS, **options)

    configs = {"PEFT LoRA": lora(), "PEFT DoRA": lora(use_dora=True)}
    configs |= {f"sora_hw {method}": ours(method) for method in METHODS}
    made = {name: lambda model, config=config: get_peft_model(model, config) for name, config in configs.items()}
    return {**made, "SORA by formula": lambda model: by_formula(model, arguments)}


def by_formula(model: nn.Module, arguments: argparse.Namespace) -> nn.Module:
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in TARGETS:
            model.set_submodule(name, SoraByFormula(module, arguments.rank, arguments.rotation_rank))
    return model


def measure(adapt: Callable[[nn.Module], nn.Module], micro_batch: int, arguments: argparse.Namespace) -> dict:
    """Tokens per second and peak memory in bytes of one method, or None for both where memory does not suffice."""
    device = torch.device(arguments.device)
    memory = torch.get_device_module(device) if device.type != "cpu" else None
    try:
        step = train_step(adapt, micro_batch, arguments)
        if memory:
            memory.reset_peak_memory_stats()  # the peak counts the first step, which decides whether a run starts
        for _ in range(3):  # to warm up
            step()
        spent = statistics.median(milliseconds(lambda: step, device) for _ in range(arguments.repeats))
        peak = memory.max_memory_allocated() if memory else None
        return {"tokens_per_second": micro_batch * LENGTH / spent * 1e3, "peak_bytes": peak}
    except torch.OutOfMemoryError:
        return {"tokens_per_second": None, "peak_bytes": None}
    finally:
        step = None
        gc.collect()
        if memory:
            memory.empty_cache()
        time.sleep(0.1)


def train_step(adapt: Callable, micro_batch: int, arguments: argparse.Namespace) -> Callable[[], None]:
    torch.manual_seed(0)
    shape = TINY if arguments.device == "cpu" else LLAMA3_8B
    with torch.device(arguments.device):
        config = LlamaConfig(**shape, num_hidden_layers=arguments.layers, dtype=torch.bfloat16, use_cache=False)
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    if arguments.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model = adapt(model).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    ids = torch.randint(shape["vocab_size"], (micro_batch, LENGTH), device=arguments.device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def speeds(results: list[dict], micro_batch: int) -> dict[str, float]:
    return {r["method"]: r["tokens_per_second"] or 0.0 for r in results if r["micro_batch"] == micro_batch}


def show(result: dict, console: Console) -> None:
    speed = result["tokens_per_second"]
    told = "out of memory" if speed is None else f"{speed:,.0f} tokens/s"
    console.print(f"{result['method']}, micro-batch {result['micro_batch']}: {told}")


def table(results: list[dict], console: Console) -> None:
    """Speed over PEFT LoRA's at the same micro-batch, and peak memory."""
    table = Table(title=f"training step, sequences of {LENGTH}; PEFT LoRA = 1")
    batches = list(dict.fromkeys(r["micro_batch"] for r in results))
    table.add_column("method")
    for batch in batches:
        table.add_column(f"micro-batch {batch}", justify="right")
    of = {(r["method"], r["micro_batch"]): r for r in results}
    for method in dict.fromkeys(r["method"] for r in results):
        cells = []
        for batch in batches:
            result, peer = of[method, batch], of["PEFT LoRA", batch]
            speed, other = result["tokens_per_second"], peer["tokens_per_second"]
            ratio = "-" if speed is None or other is None else f"{speed / other:.2f}"
            peak = f", {result['peak_bytes'] / 2**30:.2f} GiB" if result["peak_bytes"] else ""
            cells.append(ratio + peak)
        table.add_row(method, *cells)
    console.print(table)


def parse() -> argparse.Namespace:
    found = torch.accelerator.current_accelerator(check_available=True)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=found.type if found else "cpu")
    parser.add_argument("--layers", type=int, help="of the model [32, on a processor 2]")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rotation-rank", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--memory-gib", type=float, help="allow no more memory than this")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--chart", type=Path, help="draw them here, as PNG or SVG")
    arguments = parser.parse_args()
    if arguments.layers is None:
        arguments.layers = 2 if arguments.device == "cpu" else 32
    return arguments


if __name__ == "__main__":
    main()
