"""What a page shows of a run, taken from its folder: figures, curves, spectra, the lines of its charts."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sora_hw.analysis.figures import COLOURS, LABELS
from sora_hw.finished.report.charts import Point
from sora_hw.finished.report.page import Card
from sora_hw.finished.run import FinishedRun
from sora_hw.finished.spectra import Spectrum, read_spectrum
from sora_hw.recipes.recipe import EMBEDDED
from sora_hw.training.callbacks import duration
from sora_hw.training.objectives import objective_of


@dataclass(frozen=True)
class Measured:
    """A run and what it has measured so far."""

    run: FinishedRun

    @property
    def method(self) -> str:
        """The method's name for people."""
        return LABELS.get(self.run.recipe.method, self.run.recipe.method)

    @property
    def colour(self) -> str:
        """The method's, as in every picture of the project."""
        return COLOURS.get(self.run.recipe.method, COLOURS["full"])

    @property
    def model(self) -> str:
        """The model's name; of a path its last two parts."""
        model = self.run.recipe.model
        return "the embedded model" if model == EMBEDDED else "/".join(Path(model).parts[-2:])

    @property
    def loss_unit(self) -> str:
        """What the loss is counted in."""
        return objective_of(self.run.recipe).loss_unit

    @cached_property
    def spectrum(self) -> Spectrum | None:
        """What `sora-hw spectrum` has left."""
        return read_spectrum(self.run)

    def curve(self, key: str) -> list[Point]:
        """The numbers that were logged under `key`, over the steps."""
        return [(entry["step"], entry[key]) for entry in self.run.history if isinstance(entry.get(key), int | float)]

    @property
    def steps(self) -> tuple[int, int | None]:
        """How many were logged, and how many the run has."""
        data = self.run.manifest.get("data") or {}
        return max((int(entry["step"]) for entry in self.run.history), default=0), data.get("steps")

    @property
    def not_finite(self) -> int | None:
        """The first step whose loss is not a finite number."""
        return next((int(step) for step, loss in self.curve("loss") if not math.isfinite(loss)), None)

    @cached_property
    def cards(self) -> list[Card]:
        """The key figures that the run has, in the order of the table that ends it."""
        results, losses, speeds = self.run.results, self.curve("loss"), self.curve("tokens_per_second")
        last = results.get("final_loss", losses[-1][1] if losses else None)
        validation = results.get("validation_loss")
        done, planned = self.steps
        cards = [
            Card("final loss" if results else "last loss", _number(last), note=f"step {done:,} of {planned or '?'}")
        ]
        if validation is not None:
            cards.append(Card("validation loss", _number(validation), note="on records held out"))
        for part in ("validation", "test"):
            cards += [
                Card(f"{part} {name}", f"{100 * value:.2f}", "%")
                for name, value in (results.get(part) or {}).items()
                if value is not None
            ]
        if demo := results.get("embedded_questions"):
            note = f"{100 * demo['before']:.1f} before, {100 * demo['chance']:.1f} by chance"
            cards.append(Card("questions right", f"{100 * demo['after']:.1f}", "%", note))
        if speed := results.get("tokens_per_second"):
            cards.append(Card("speed", f"{speed:,.0f}", "tokens/s"))
        elif speeds:
            cards.append(Card("speed", f"{speeds[-1][1]:,.0f}", "tokens/s", "when last logged"))
        memory = results.get("peak_memory_bytes")
        peaks = self.curve("peak_memory_gib")
        if memory or peaks:
            cards.append(Card("peak memory", f"{memory / 2**30 if memory else peaks[-1][1]:.2f}", "GiB", "on rank 0"))
        if rate := results.get("trainable_percent"):
            cards.append(Card("trainable", f"{rate:.3f}", "%", "of the parameters"))
        since = "since it was resumed" if self.run.manifest.get("resumed_from") else "of training"
        if seconds := results.get("seconds"):
            cards.append(Card("time", duration(seconds), note=since))
        if self.spectrum:
            cards.append(Card("entropy", f"{self.spectrum.mean_entropy:.2f}", "nats", "mean over layers"))
        return cards


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if math.isfinite(value) else "not finite"
