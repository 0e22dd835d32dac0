"""How much faster than PEFT's DoRA every method is, in training and at inference, as the paper's Figure 5.

    python kernels/bench/figure.py [FILE] [--output FOLDER]

FILE is what linear.py or step.py has measured, with both kinds of passes; without it the newest of
kernels/bench/results/{step,linear}.json. Leaves speed.png and speed.svg in FOLDER, which is that of FILE. The paper's
two percentages stand as marks on the bars of the methods that they are of.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sora_hw.analysis.figures import COLOURS, LABELS
from sora_hw.recipes.published import INFERENCE_OVER_DORA, TRAINING_OVER_DORA

RESULTS = Path(__file__).parent / "results"
OURS = "sora_hw "
DORA, FROZEN = "PEFT DoRA", "frozen linear"
OTHERS = {"PEFT LoRA": "lora", DORA: "dora", "PEFT OFT": "oft", "LoRA by hand": "lora", "SORA by formula": "sora"}
MARK = "the paper's, over its DoRA"
PAPER = {"training": TRAINING_OVER_DORA, "inference": INFERENCE_OVER_DORA}
PASSES = {"training": "both", "inference": "inference"}  # of linear.py
SPEEDS = {"training": "tokens_per_second", "inference": "inference_tokens_per_second"}  # of step.py


@dataclass(frozen=True)
class Case:
    """One size of the problem: for "training" and "inference" the speed of every method as a multiple of DoRA's."""

    title: str
    speeds: Mapping[str, Mapping[str, float]]


def main() -> None:
    arguments = parse()
    content = json.loads(arguments.file.read_text())
    cases = cases_of(content)
    if not cases:
        raise SystemExit(f"{arguments.file}: no size of which training and inference were measured, {DORA} among them")
    drawn = draw(cases, caption(content))
    folder = arguments.output or arguments.file.parent
    folder.mkdir(parents=True, exist_ok=True)
    for ending in ("png", "svg"):
        drawn.savefig(folder / f"speed.{ending}", dpi=150, metadata={"Date": None} if ending == "svg" else None)
        print(folder / f"speed.{ending}")


def cases_of(content: Mapping) -> list[Case]:
    """The sizes with figures of both kinds; of a large grid the paper's ranks, and a whole block of the model."""
    results = content["results"]
    if "method" in results[0]:
        return _whole_models(results, content["machine"])
    for name, wanted in (("shape", "block"), ("rank", 16), ("rotation_rank", 1)):
        if any(result[name] == wanted for result in results):
            results = [result for result in results if result[name] == wanted]
    sizes: dict[tuple, dict[str, Mapping[str, float]]] = {}
    for result in results:
        size = tuple(result[name] for name in ("dtype", "shape", "rank", "rotation_rank", "rows"))
        sizes.setdefault(size, {})[result["pass"]] = result["ratios"]
    return [
        Case(
            f"{dtype}, {_layers(shape)}, N {rows}, r {rank}, rp {rotation_rank}",
            {
                panel: {name: passes[of][DORA] / ratio for name, ratio in passes[of].items()}
                for panel, of in PASSES.items()
            },
        )
        for (dtype, shape, rank, rotation_rank, rows), passes in sizes.items()
        if all(DORA in passes.get(of, ()) for of in PASSES.values())
    ]


def _layers(shape: str) -> str:
    return "the linear layers of a block of LLaMA3-8B" if shape == "block" else f"a linear layer {shape}"


def _whole_models(results: Sequence[Mapping], machine: Mapping) -> list[Case]:
    cases = []
    for batch in dict.fromkeys(result["micro_batch"] for result in results):
        theirs = {result["method"]: result for result in results if result["micro_batch"] == batch}
        dora = theirs[DORA]
        if all(dora[name] for name in SPEEDS.values()):
            title = f"bfloat16, {machine['layers']} layers, {batch} x 512 tokens, r {machine['rank']}, "
            speeds = {
                panel: {method: result[name] / dora[name] for method, result in theirs.items() if result[name]}
                for panel, name in SPEEDS.items()
            }
            cases.append(Case(title + f"rp {machine['rotation_rank']}", speeds))
    return cases


def caption(content: Mapping) -> str:
    """On what, with what and when it was measured."""
    machine = content["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "peft") if name in machine)
    return (
        f"{machine['hardware']}, {versions}, {machine['date']}. Training is forward and backward pass"
        f"{' and the step of AdamW' if 'layers' in machine else ''}, inference the forward pass with the adapter "
        "unmerged.\nThe paper's are of LLaMA3-8B on the machines of its authors (Figure 5)."
    )


def draw(cases: Sequence[Case], text: str) -> Figure:
    """A row for every case, a panel for training and one for inference, a bar for every method."""
    methods = [_methods(case) for case in cases]
    heights = [0.24 * len(names) + 0.9 for names in methods]
    style = {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "sora_hw", "hatch.linewidth": 0.6}
    with rc_context(style):
        figure = Figure(figsize=(10, sum(heights) + 0.9), layout="constrained")
        grid = figure.subplots(len(cases), 2, squeeze=False, sharey="row", height_ratios=heights)
        for axes, case, names in zip(grid, cases, methods, strict=True):
            for panel, on in zip(PAPER, axes, strict=True):
                _panel(on, names, case.speeds[panel], PAPER[panel])
                on.set_title(f"{panel}: {case.title}", fontsize=9, loc="left")
        for on in grid[-1]:
            on.set_xlabel(f"speed, {DORA} = 1")
        shown = [zip(*on.get_legend_handles_labels(), strict=True) for on in grid.flat]
        handles = {label: handle for pairs in shown for handle, label in pairs}
        figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=len(handles), frameon=False)
        figure.supxlabel(text, fontsize=8, x=0.01, ha="left")
    return figure


def _methods(case: Case) -> list[str]:
    """The peers, then ours, as they were measured; the frozen layer is a line."""
    names = [name for name in dict.fromkeys([*case.speeds["training"], *case.speeds["inference"]]) if name != FROZEN]
    return sorted(names, key=lambda name: (name.startswith(OURS), list(COLOURS).index(_method(name))))


def _panel(axes: Axes, methods: Sequence[str], speeds: Mapping[str, float], paper: Mapping[str, float]) -> None:
    for place, name in enumerate(methods):
        if name not in speeds:
            continue
        ours, method = name.startswith(OURS), _method(name)
        axes.barh(
            place,
            speeds[name],
            height=0.72,
            color=COLOURS[method],
            alpha=1.0 if ours else 0.45,
            hatch=None if ours else "////",
            edgecolor="white",
        )
        axes.annotate(f"{speeds[name]:.2f}", (0, place), (4, 0), textcoords="offset points", va="center_baseline")
        if name == f"{OURS}{method}" and method in paper:
            axes.plot(1 + paper[method] / 100, place, "D", color="black", markerfacecolor="white", label=MARK)
    axes.axvline(1, color="black", linewidth=0.8)
    if FROZEN in speeds:
        axes.axvline(speeds[FROZEN], color="black", linewidth=0.8, linestyle="--", label="the frozen layer alone")
    furthest = max([*speeds.values(), *(1 + percent / 100 for percent in paper.values())])
    axes.set_xlim(0, 1.12 * furthest)
    axes.set_yticks(range(len(methods)), [_label(name) for name in methods])
    axes.set_ylim(len(methods) - 0.4, -0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _method(name: str) -> str:
    plain = name.partition(",")[0]
    return plain.removeprefix(OURS) if plain.startswith(OURS) else OTHERS[plain]


def _label(name: str) -> str:
    plain, comma, more = name.partition(",")
    return (f"{OURS}{LABELS[_method(name)]}" if plain.startswith(OURS) else plain) + comma + more


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="of linear.py or step.py")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for speed.png and speed.svg [that of FILE]")
    arguments = parser.parse_args()
    if arguments.file is None:
        measured = [file for file in (RESULTS / "step.json", RESULTS / "linear.json") if file.exists()]
        if not measured:
            parser.error("nothing has been measured yet: run make bench")
        arguments.file = max(measured, key=lambda file: file.stat().st_mtime)
    return arguments


if __name__ == "__main__":
    main()
