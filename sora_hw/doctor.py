"""What `sora-hw doctor` finds out: versions, devices and what each of them needs, kernels, recipes, the machine."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from sora_hw import ops, recipes
from sora_hw.devices import DEVICES, Device
from sora_hw.devices.detect import FALLBACK_VARIABLE, fallback_allowed, missing_kernels
from sora_hw.versions import SUPPORTED, verdicts

OK, NO, BROKEN = Text("ok", style="green"), Text("no", style="yellow"), Text("broken", style="red")
GIB = 2**30


@dataclass
class Section:
    """One table of facts.

    Attributes:
        table: what is here.
        notes: what is missing without harm, and what to do to get it; one line each.
        problems: what is broken, and what to do; one line each.
    """

    table: Table
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def examine() -> Iterator[Section]:
    """The sections, each found out when it is asked for."""
    yield _versions()
    yield _devices()
    yield from _needs()
    yield _environment()
    yield _kernels()
    yield _recipes()
    yield _machine()


def ready() -> list[str]:
    """The values of --backend with which training can start."""
    return [device.type for device in DEVICES.values() if not (device.is_usable() or missing_kernels(device))]


def _versions() -> Section:
    section = Section(_table("Versions", "", "installed", "supported", "tested", ""))
    for verdict in verdicts():
        support = SUPPORTED[verdict.name]
        state = BROKEN if verdict.problem else OK
        section.table.add_row(verdict.name, verdict.installed or "-", support.versions, support.tested, state)
        if verdict.problem:
            section.problems.append(verdict.problem)
    return section


def _devices() -> Section:
    section = Section(_table("Devices", "--backend", "device", "count", "memory", "communication", "usable"))
    for device in DEVICES.values():
        if device.is_usable():
            row = (device.display_name, "-", "-", device.communication_backend, BROKEN if device.is_expected() else NO)
        else:
            memory = f"{device.memory_bytes() / GIB:.1f} GiB"
            row = (device.name(), str(device.count()), memory, device.communication_backend, OK)
        section.table.add_row(device.type, *row)
    return section


def _needs() -> Iterator[Section]:
    """What each device needs, line by line. A lack is a problem where the device is meant to be used, else a note."""
    for device in DEVICES.values():
        checks, expected = list(device.checks()), device.is_expected()
        section = Section(_table(f"Needs of {device.type}", "", "found", ""))
        for check in checks:
            state = (BROKEN if expected else NO) if check.problem else OK
            section.table.add_row(check.what, check.found, state)
        lacks = [f"{device.type}: {check.problem}" for check in checks if check.problem]
        if expected:
            section.problems += lacks
        else:
            section.notes += lacks[:1]
        yield section


def _environment() -> Section:
    """The variables that the launchers set for a device of this machine, where the user has not."""
    section = Section(_table("Environment", "--backend", "variable", "value", "from"))
    for device in DEVICES.values():
        if device.is_expected() or device.is_usable() is None:
            for variable, value in device.environment.items():
                here = os.environ.get(variable)
                section.table.add_row(device.type, variable, *((value, "sora_hw") if here is None else (here, "you")))
    return section


def _kernels() -> Section:
    """Who serves each device. A package that fails is a problem where its device is; a device without one is none."""
    section = Section(_table("Kernels", "device", "package", "kernels", "folder", "state"))
    packages = ops.kernel_packages()
    for package in packages:
        device = DEVICES.get(package.device_type)
        problem = package.error or _operator_problem(device)
        needed = device is None or device.is_usable() is None
        state = (BROKEN if needed else NO) if problem else OK
        section.table.add_row(
            package.device_type, package.distribution, package.describe(), _folder(package.module), state
        )
        if problem:
            found = section.problems if needed else section.notes
            found.append(f"the kernels for {package.device_type} ({package.module}): {problem}")
    for device in DEVICES.values():
        if device.type in {package.device_type for package in packages}:
            continue
        if missing := missing_kernels(device):
            section.table.add_row(device.type, "-", "-", "-", NO)
            (section.problems if device.type == "cpu" else section.notes).append(missing)
        else:
            section.table.add_row(device.type, "slow generic operators", "-", "-", f"{FALLBACK_VARIABLE}=1")
    return section


def _operator_problem(device: Device | None) -> str | None:
    """None where the first operator computes on `device` what its formula says, or where it cannot be tried."""
    if device is None or device.is_usable():
        return None
    generator = torch.Generator().manual_seed(0)
    base, scale, z, b = (torch.randn(shape, generator=generator) for shape in ((4, 8), (8,), (4, 2), (8, 2)))
    here = device.torch_device(0)
    try:
        y = ops.scale_rank_update(base.to(here), scale.to(here), z.to(here), b.to(here)).cpu()
    except Exception as error:  # a vendor's kernel may fail in any way; the doctor reports it and goes on
        return _one_line(error)
    return None if torch.allclose(y, scale * base + z @ b.T, atol=1e-4) else "scale_rank_update gives a wrong result"


def _recipes() -> Section:
    section = Section(_table("Recipes", "launcher", "base model", "state"))
    for name in recipes.BENCHMARKS:
        try:
            recipe = importlib.import_module(f"{recipes.__name__}.{name}").recipe()
        except Exception as error:  # whatever keeps a recipe from loading is what the doctor is asked for
            section.problems.append(f"the recipe {name} does not load: {_one_line(error)}")
            section.table.add_row(name, "-", BROKEN)
        else:
            section.table.add_row(name, recipe.model, OK)
    return section


def _machine() -> Section:
    section = Section(_table("Machine", "", ""))
    compiler = _compiler()
    section.table.add_row("cores", str(_cores()))
    section.table.add_row("memory", f"{DEVICES['cpu'].memory_bytes() / GIB:.1f} GiB")
    section.table.add_row("C++ compiler", compiler or NO)
    section.table.add_row(FALLBACK_VARIABLE, "1" if fallback_allowed() else "not set")
    if compiler is None:
        section.notes.append("C++ compiler: training runs without one; install g++ for DeepSpeed's own extensions")
    return section


def _cores() -> int:
    """The cores that this process may use, where the system tells; a container often has fewer than its host."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _compiler() -> str | None:
    """The compiler that torch builds extensions with, by its own description."""
    command = shlex.split(os.environ.get("CXX", "c++"))
    if not command or shutil.which(command[0]) is None:
        return None
    answer = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return answer.stdout.partition("\n")[0] if answer.returncode == 0 else None


def _folder(module: str) -> str:
    spec = importlib.util.find_spec(module)
    return str(Path(spec.origin).parent) if spec and spec.origin else "-"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
