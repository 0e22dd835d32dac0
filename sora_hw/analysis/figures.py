"""The paper's figures of spectra, drawn from runs: entropy by layer, singular values, entropy by method and task.

Of the paper's own pictures only what they show is known; each function says what stands here in place of which.
Colours, names and order of the methods are told here once, for every picture of the project.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sora_hw.analysis.spectrum import LayerSpectrum

# In the order of every legend and table. The colours are Okabe and Ito's and Tol's, told apart by the colour-blind, and
# seen on a white and on a black page.
COLOURS = {
    "lora": "#56B4E9",
    "dora": "#E69F00",
    "post_diag": "#999933",
    "prediag": "#009E73",
    "pre_ortho": "#CC79A7",
    "post_ortho": "#0072B2",
    "sora": "#D55E00",
    "full": "#777777",
    "lora_plus": "#AA4499",
    "oft": "#882255",
}
LABELS = {
    "lora": "LoRA",
    "dora": "DoRA",
    "post_diag": "Post-Diag",
    "prediag": "Pre-Diag",
    "pre_ortho": "Pre-Ortho",
    "post_ortho": "Post-Ortho",
    "sora": "SORA",
    "full": "full fine-tuning",
    "lora_plus": "LoRA+",
    "oft": "OFT",
}
_MARKERS = dict(zip(COLOURS, "osd^v<>DPX", strict=True))
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: small files that can be searched
    "svg.hashsalt": "sora_hw",  # the same picture gives the same file
}
_COLUMNS = 3  # panels beside one another
_POINTS = 80  # of a spectrum, evenly over the logarithm of the index
_SMALLEST = 1e-4  # of the largest singular value; what is below adds nothing to the entropy


@dataclass(frozen=True)
class Series:
    """The runs of one method on one task that differ in their seed alone.

    Attributes:
        method: a key of `COLOURS`.
        note: what tells it from others of the same method and task; mostly empty.
        task: what was learned.
        runs: for each seed its layers.
    """

    method: str
    note: str
    task: str
    runs: Sequence[Sequence[LayerSpectrum]]

    @property
    def label(self) -> str:
        """For legends and tables."""
        return LABELS[self.method] + (f", {self.note}" if self.note else "")

    def means(self, attribute: str) -> list[float]:
        """For each seed the mean over its layers of an attribute of theirs."""
        return [statistics.fmean(getattr(layer, attribute) for layer in layers) for layers in self.runs]

    def of_kind(self, kind: str) -> dict[int, list[LayerSpectrum]]:
        """The layers of one place in their block: block -> of each seed the layer there."""
        blocks: dict[int, list[LayerSpectrum]] = {}
        for layer in (layer for layers in self.runs for layer in layers):
            block, place = layer.place
            if place == kind:
                blocks.setdefault(block, []).append(layer)
        return blocks


def draw_all(series: Sequence[Series], folder: Path) -> list[Path]:
    """Every figure as PNG and SVG in `folder`: two for each task, one of all tasks. Returns the files."""
    files = []
    for task in dict.fromkeys(each.task for each in series):
        of_task = [each for each in series if each.task == task]
        name = re.sub(r"[^\w-]", "_", task)  # out of a run's folder, which may be a stranger's
        files += _draw(lambda of_task=of_task: entropy_by_layer(of_task), folder / f"entropy-by-layer-{name}")
        files += _draw(lambda of_task=of_task: spectra_by_kind(of_task), folder / f"singular-values-{name}")
    return files + _draw(lambda: entropy_by_method(series), folder / "entropy-by-method")


def _draw(make: Callable[[], Figure], path: Path) -> list[Path]:
    files = [path.with_name(f"{path.name}.{kind}") for kind in ("png", "svg")]
    for file in files:
        file.unlink(missing_ok=True)  # it may be a link
    with rc_context(_STYLE):
        figure = make()
        figure.savefig(files[0], dpi=150)
        figure.savefig(files[1], metadata={"Date": None})
    return files


def entropy_by_layer(series: Sequence[Series]) -> Figure:
    """The paper's Figure 1, our counterpart: singular-value entropy of `dW` in every layer, one line per method.

    A panel for each kind of layer, over the blocks of the model; the mean over the seeds, shaded from the least to the
    greatest. Dotted: log r, which no update of LoRA's rank exceeds.
    """

    def lines(axes: Axes, each: Series, kind: str, style: dict) -> None:
        blocks = sorted(each.of_kind(kind).items())
        where = [block for block, _ in blocks]
        values = [[layer.entropy for layer in layers] for _, layers in blocks]
        axes.plot(where, [statistics.fmean(seeds) for seeds in values], **style)
        axes.fill_between(
            where, [min(v) for v in values], [max(v) for v in values], color=style["color"], alpha=0.15, lw=0
        )
        if each.method == "lora":
            rank = max(len(layer.singular_values) for _, layers in blocks for layer in layers)
            axes.axhline(math.log(rank), color="#777777", linestyle=":", linewidth=1, zorder=0)
            if axes is axes.figure.axes[0]:
                axes.annotate(
                    f"log {rank}",
                    (1, math.log(rank)),
                    (0, 2),
                    xycoords=("axes fraction", "data"),
                    textcoords="offset points",
                    ha="right",
                    color="#777777",
                    fontsize=8,
                )

    figure = _panels(series, lines)
    figure.supxlabel("block", fontsize=10)
    figure.supylabel("singular-value entropy of the update (nats)", fontsize=10)
    return figure


def spectra_by_kind(series: Sequence[Series]) -> Figure:
    """The paper's Figure 2, our counterpart: the singular values of `dW`, sorted, over the largest.

    A panel for each kind of layer; the median over blocks and seeds, shaded from the lower to the upper quartile.
    A line ends with a marker; what ends early has only zeros behind it.
    """

    def lines(axes: Axes, each: Series, kind: str, style: dict) -> None:
        layers = [layer for layers in each.of_kind(kind).values() for layer in layers if layer.norm > 0]
        if not layers:
            return
        count = min(len(layer.singular_values) for layer in layers)
        values = np.array([layer.singular_values[:count] for layer in layers])
        low, middle, high = np.quantile(values / values[:, :1], [0.25, 0.5, 0.75], axis=0)
        shown = np.unique(np.geomspace(1, count, _POINTS).round().astype(int)) - 1
        axes.plot(shown + 1, middle[shown], **style, markevery=[-1])
        axes.fill_between(shown + 1, low[shown], high[shown], color=style["color"], alpha=0.15, lw=0)
        axes.set(xscale="log", yscale="log", ylim=(_SMALLEST, 1.5))

    figure = _panels(series, lines)
    figure.supxlabel("index of the singular value", fontsize=10)
    figure.supylabel("singular value of the update, over the largest", fontsize=10)
    return figure


def entropy_by_method(series: Sequence[Series]) -> Figure:
    """The paper's Figure 4, our counterpart: mean singular-value entropy of the layers, as bars by task and method.

    The lines on the bars are the standard deviation over the seeds.
    """
    tasks = list(dict.fromkeys(each.task for each in series))
    bars = list(dict.fromkeys((each.method, each.note) for each in series))
    figure = Figure(figsize=(max(9.0, 1.2 + 0.24 * len(tasks) * (len(bars) + 1)), 3.8), layout="constrained")
    axes = figure.subplots()
    width = 1 / (len(bars) + 1.5)
    hatches = dict(zip(dict.fromkeys(note for _, note in bars), cycle(["", "//", "..", "xx"]), strict=False))
    for number, (method, note) in enumerate(bars):
        mine = [each for each in series if (each.method, each.note) == (method, note)]
        where = [tasks.index(each.task) + (number - (len(bars) - 1) / 2) * width for each in mine]
        means = [each.means("entropy") for each in mine]
        axes.bar(
            where,
            [statistics.fmean(seeds) for seeds in means],
            0.92 * width,
            yerr=[statistics.stdev(seeds) if len(seeds) > 1 else 0.0 for seeds in means],
            error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#333333"},
            color=COLOURS[method],
            edgecolor="white",
            hatch=hatches[note],
            label=mine[0].label,
        )
    axes.set_xticks(range(len(tasks)), tasks)
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel("singular-value entropy (nats)")
    figure.legend(loc="outside upper center", ncols=min(len(bars), 7), columnspacing=1.2, handlelength=1.2)
    return figure


def _panels(series: Sequence[Series], lines: Callable[[Axes, Series, str, dict], None]) -> Figure:
    """A panel for each kind of layer, in which `lines` draws every series in its style; one legend above them."""
    kinds = list(dict.fromkeys(layer.place[1] for each in series for layers in each.runs for layer in layers))
    columns = min(_COLUMNS, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    figure = Figure(figsize=(1.2 + 2.8 * columns, 1.1 + 2.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    dashes = dict(zip(dict.fromkeys(each.note for each in series), cycle(["-", "--", ":", "-."]), strict=False))
    for axes, kind in zip(panels, kinds, strict=False):
        for each in series:
            style = {"color": COLOURS[each.method], "marker": _MARKERS[each.method], "linestyle": dashes[each.note]}
            if each.method == "pre_ortho":  # lies on Post-Ortho: both are seen if one is dashed and on top
                style |= {"dashes": (3, 2), "zorder": 3}
            lines(
                axes,
                each,
                kind,
                {**style, "markersize": 5, "markeredgewidth": 0, "linewidth": 1.5, "label": each.label},
            )
        axes.set_title(kind, fontsize=10)
    for axes in list(panels)[len(kinds) :]:
        axes.remove()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 7), columnspacing=1.2)
    return figure
