"""What a run tells: the plan before it, a table and the loss curve after it, and run.json to repeat it by."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.table import Table

import sora_hw
from sora_hw import ops
from sora_hw.devices.device import Device
from sora_hw.terminal import Console
from sora_hw.training.plan import Plan
from sora_hw.versions import verdicts


def what_runs(plan: Plan) -> str:
    """One line: what runs where."""
    recipe, profile, batch = plan.recipe, plan.profile, plan.batch
    return (
        f"{recipe.method} on {recipe.model}: {plan.device.display_name} ({plan.device.name()}), "
        f"ZeRO-{profile.zero_stage}, {profile.dtype}, global batch {batch.global_batch} = {batch.world_size} ranks x "
        f"{batch.micro_batch} samples x {batch.accumulation} steps, kernels of {kernels(plan.device)}"
    )


def kernels(device: Device) -> str:
    """Whose kernels serve `device`."""
    package = ops.serving(device.type)
    return package.describe() if package else "the slow generic operators (SORA_HW_FALLBACK=1)"


def print_sections(plan: Mapping[str, object], console: Console) -> None:
    """Every value of the plan on a line of its own."""
    for section, content in plan.items():
        if not isinstance(content, Mapping):
            console.print(f"{section}: {content}")
            continue
        console.print(f"{section}:")
        for name, value in content.items():
            shown = json.dumps(value) if isinstance(value, Mapping | list | tuple) else value
            console.print(f"  {name}: {shown}")


def print_results(results: Mapping[str, object], device: Device, console: Console) -> None:
    """The short table at the end."""
    table = Table(show_header=False, title="finished", title_justify="left")
    demo = results["embedded_questions"] or {}
    rows = {
        "device": device.name(),
        "steps": f"{results['steps']}",
        "final loss": f"{results['final_loss']:.4f}",
        "validation loss": _shown(results["validation_loss"], "{:.4f}"),
        **{f"validation {name}": f"{value:.4f}" for name, value in results["validation"].items()},
        **{f"test {name}": f"{value:.4f}" for name, value in results["test"].items()},
        "speed": _shown(results["tokens_per_second"] or None, "{:,.0f} tokens/s"),
        "peak memory": f"{results['peak_memory_bytes'] / 2**30:.2f} GiB on rank 0",
        "trainable": f"{results['trainable_percent']:.3f} % of the parameters",
        "held-out questions": demo and f"{demo['questions']}, right by chance {demo['chance']:.1%}",
        "right before": demo and f"{demo['before']:.1%}",
        "right after": demo and f"{demo['after']:.1%}",
        "adapter": results.get("adapter"),
        "model": results.get("model"),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    console.print(table)


def _shown(value: float | None, form: str) -> str | None:
    return None if value is None else form.format(value)


def draw_losses(history: Sequence[Mapping[str, float]], unit: str, file: Path) -> None:
    """The loss curve as a PNG, the validation losses as points on it; `unit` is that of the losses."""
    from matplotlib.figure import Figure  # which no start need wait for

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(xlabel="optimiser step", ylabel=f"loss ({unit})")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def facts(device: Device) -> dict[str, object]:
    """What decides a run's numbers beside its plan."""
    return {
        "started": now(),
        "versions": {"sora_hw": sora_hw.__version__, **{each.name: each.installed for each in verdicts()}},
        "git_commit": _git_commit(),
        "device_name": device.name(),
        "kernels": kernels(device),
    }


def _git_commit() -> str | None:
    """The commit of the source that runs, with "-dirty" when it was changed since; None where it is no checkout."""
    git = ["git", "-C", str(Path(sora_hw.__file__).parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], check=True, capture_output=True)
        described = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(described, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def now() -> str:
    """The time as run.json gives it: UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
