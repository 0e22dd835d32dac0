"""PEFT's own tests for `ConditionedConfig`: what `ci/peft` gives to pytest with `-p peft_suite.plugin`.

PEFT's generic tests run over lists of rows, one or more for every method. Each row of LoRA becomes one for every preset
here (`counterparts`), and the other methods' rows are left out. Tests that name `LoraConfig` in their body run with a
class that stands for it, once for every preset. What tests of PEFT say of "LoRA's" abilities by comparing classes they
thereby say of ours. A report of what was left out, and why, is printed at the end.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
import sys
from collections import Counter
from types import ModuleType, SimpleNamespace

import peft
import pytest
import torch
from peft import LoraConfig
from peft_suite.counterparts import (
    LikeDora,
    NoCounterpart,
    StandIn,
    class_of,
    counterpart,
    given,
    presets_of,
    with_lora_defaults,
)
from peft_suite.exemptions import exempt, learns_like_dora, only_in_lora

import sora_hw
from sora_hw import ConditionedConfig, ConditionedLinear
from sora_hw.conditioning import PRESETS

_left_out: Counter[str] = Counter()
_CLASS_NAMES = ("config_cls", "config_class")
_EMPTY = "no row of LoRA"
_OF_EVERY_METHOD = ("test_from_peft_type",)  # goes through PEFT's table of methods, and so through ours


def pytest_configure(config: pytest.Config) -> None:
    for mark in ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes"):
        config.addinivalue_line("markers", f"{mark}: PEFT's")
    try:
        import diffusers  # noqa: F401
    except ImportError:  # PEFT's tests ask it only whether a model is one of its pipelines
        stand_in = sys.modules["diffusers"] = ModuleType("diffusers")
        stand_in.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})


def pytest_report_header() -> str:
    return f"peft {peft.__version__}'s tests for sora_hw from {sora_hw.__file__}"


@pytest.fixture(autouse=True)
def standing_for_lora(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset that `LoraConfig` stands for in one test, in whose body our `A` answers to LoRA's name.

    Not every test of PEFT sets a seed, and outputs that should differ could be alike by chance: here each has one.
    """
    torch.manual_seed(0)
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    method = parameters.get("preset") or getattr(parameters.get("config_cls"), "preset", None)
    if method:
        monkeypatch.setattr(StandIn, "method", method)
        monkeypatch.setattr(ConditionedLinear, "lora_A", property(_named_as_in_lora), raising=False)


def _named_as_in_lora(layer: ConditionedLinear) -> dict[str, SimpleNamespace]:
    return {name: SimpleNamespace(weight=a) for name, a in layer.conditioned_A.items()}


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marks = metafunc.definition.own_markers
    has_rows = False
    for i, mark in enumerate(marks):
        if mark.name != "parametrize":
            continue
        names = [name.strip() for name in mark.args[0].split(",")] if isinstance(mark.args[0], str) else mark.args[0]
        values = [_cells(value, len(names)) for value in mark.args[1]]
        if any(name in _CLASS_NAMES for name in names):
            rows = [row for cells in values for row in _rows_of_class(names, cells, metafunc.function.__name__)]
        elif any(isinstance(cell, LoraConfig) for cells in values for cell in cells):
            rows = [row for cells in values for row in _rows_of_instances(cells)]
        else:
            continue
        has_rows = True
        rows = rows or [pytest.param(*[_EMPTY] * len(names), id=_EMPTY)]
        keywords = {key: value for key, value in mark.kwargs.items() if key != "ids"}
        marks[i] = pytest.mark.parametrize(",".join(names), rows, **keywords).mark
    if not has_rows and _names_lora(metafunc.definition):
        metafunc.fixturenames.append("preset")
        metafunc.parametrize("preset", list(PRESETS), indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for module in [m for name, m in sys.modules.items() if name.startswith("tests.")]:
        _teach(module)
    kept, dropped = [], []
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        others = _EMPTY in [value for value in parameters.values() if isinstance(value, str)]
        ours = {"preset", "test_name", *_CLASS_NAMES} & parameters.keys() or _names_ours(parameters)
        others |= not (ours or item.originalname in _OF_EVERY_METHOD)
        reason = None if others else exempt(item)
        if reason:
            _left_out[f"{item.nodeid.split('::', 1)[1].split('[')[0]}: {reason}"] += 1
        (dropped if others or reason else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of several processes, which all leave out the same
        session.config.workeroutput["left_out"] = dict(_left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    _left_out.update(getattr(node, "workeroutput", {}).get("left_out", {}) if not _left_out else {})


def pytest_terminal_summary(terminalreporter) -> None:
    if _left_out:
        terminalreporter.section("rows and tests of LoRA without a counterpart")
        for what, count in sorted(_left_out.items()):
            terminalreporter.line(f"{what} ({count})")


def _cells(value: object, count: int) -> tuple:
    """The cells of one row of a parametrize mark."""
    if hasattr(value, "marks"):
        value = value.values
        return tuple(value)
    return tuple(value) if count > 1 else (value,)


def _rows_of_class(names: list[str], cells: tuple, test: str) -> list:
    """The rows that stand for one row with a class and, mostly, its keywords."""
    row = dict(zip(names, cells, strict=True))
    place = next(name for name in names if name in _CLASS_NAMES)
    if row[place] is not LoraConfig:
        return []
    keywords = [name for name in names if "kwargs" in name]
    if not keywords:
        return [pytest.param(*(row | {place: class_of(method)}).values(), id=method) for method in PRESETS]
    label = str(row.get("test_name", ""))
    try:
        ours = {name: with_lora_defaults(counterpart(row[name])) for name in keywords}
    except NoCounterpart as reason:
        _left_out[f"{label or 'row'}, {reason}"] += 1
        return []
    rows = []
    for method in presets_of(ours[keywords[0]]):
        new = row | {place: ConditionedConfig}
        new |= {name: copy.deepcopy({**ours[name], "method": method}) for name in keywords}
        if learns_like_dora(test, row.get("model_id"), method):
            new["config_kwargs"] = LikeDora(new["config_kwargs"])
        rows.append(pytest.param(*new.values(), id=f"{method}|{label}" if label else method))
    return rows


def _rows_of_instances(cells: tuple) -> list:
    """The rows that stand for one row with configurations already made."""
    if not any(isinstance(cell, LoraConfig) for cell in cells):
        return []
    label = next((cell for cell in cells if isinstance(cell, str)), "")
    rows = []
    for method in PRESETS:
        new = []
        for cell in cells:
            if isinstance(cell, LoraConfig):
                cell = ConditionedConfig(**{"method": method, **with_lora_defaults(counterpart(given(cell)))})
            new.append(cell)
        rows.append(pytest.param(*new, id=f"{method}|{label}" if label else None))
    return rows


def _names_lora(function: pytest.Function) -> bool:
    """Whether a test without rows names LoRA's configuration in its body."""
    return re.search(r"(?<!\w)LoraConfig\b", inspect.getsource(function.obj)) is not None


def _names_ours(parameters: dict[str, object]) -> bool:
    return any(isinstance(value, ConditionedConfig) for value in parameters.values())


def _teach(module: ModuleType) -> None:
    """Let a module of PEFT's tests take our configuration for LoRA's."""
    if getattr(module, "LoraConfig", None) is LoraConfig and not module.__name__.endswith("testing_utils"):
        module.LoraConfig = StandIn
    if hasattr(module, "hub_online_once"):
        module.hub_online_once = lambda model_id: contextlib.nullcontext()
    if getattr(getattr(module, "lora", None), "LoraLayer", None) is not None:
        module.lora = SimpleNamespace(LoraLayer=ConditionedLinear)
    if hasattr(module, "_skip_if_merging_not_supported"):
        module._skip_if_merging_not_supported = lambda *_: None  # everything here merges, grouped convolutions too
    if hasattr(module, "LoraLayer"):
        module.LoraLayer = ConditionedLinear
    if module.__name__.endswith("testing_common"):
        module.LoHaConfig = StandIn  # whose tolerance a merged grouped convolution has
    for name, value in vars(module).items():
        if inspect.isclass(value) and hasattr(value, "check_requires_grad") and name == "TestRequiresGrad":
            value.check_requires_grad = only_in_lora(value.check_requires_grad)
