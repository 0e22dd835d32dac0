"""The results of a benchmark as a bar chart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib


def draw(groups: Mapping[str, Mapping[str, float]], axis: str, file: Path) -> None:
    """One group of bars for each case, one bar for each peer, to a PNG or SVG file."""
    matplotlib.use("Agg")
    from matplotlib import pyplot  # chooses its backend while it is imported

    peers = list(dict.fromkeys(peer for ratios in groups.values() for peer in ratios))
    figure, axes = pyplot.subplots(figsize=(max(8, 2.5 * len(groups)), 5), layout="constrained")
    width = 0.8 / len(peers)
    for position, peer in enumerate(peers):
        places = [index + (position - len(peers) / 2 + 0.5) * width for index in range(len(groups))]
        axes.bar(places, [ratios.get(peer, 0.0) for ratios in groups.values()], width, label=peer)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylabel(axis)
    axes.legend(fontsize="small", ncols=2)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
