"""The spectra of what runs have learned: RUN/spectrum.json, a table, and the paper's figures of them."""

import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from sora_hw.analysis.figures import COLOURS, Series, draw_all
from sora_hw.analysis.spectrum import LayerSpectrum
from sora_hw.errors import UserError
from sora_hw.finished.layer_spectra import Watch, layer_spectra
from sora_hw.finished.run import FinishedRun, read_runs
from sora_hw.recipes.recipe import Recipe
from sora_hw.storage import checksum, read_json, write_whole
from sora_hw.terminal import Console
from sora_hw.training.run_folder import RUNS

FILE = "spectrum.json"
VERSION = 1
IDENTITY = ("*.safetensors", "*config.json")  # the files of what was trained that its spectrum is of
PLAIN_SECONDS = 30  # between lines of progress where there is no terminal


@dataclass(frozen=True)
class Spectrum:
    """Of one run. `trained` is the checksum of what it trained; `recipe` its recipe's name, such as glue-rte."""

    method: str
    recipe: str
    seed: int
    trained: str
    layers: Sequence[LayerSpectrum]

    @property
    def mean_entropy(self) -> float:
        """Over the layers, nats."""
        return statistics.fmean(layer.entropy for layer in self.layers)

    @property
    def mean_stable_rank(self) -> float:
        """Over the layers."""
        return statistics.fmean(layer.stable_rank for layer in self.layers)


def read_spectrum(run: FinishedRun) -> Spectrum | None:
    """The spectrum in the run's folder; None where there is none of what now lies trained there.

    Raises UserError where the file is damaged.
    """
    file = run.path / FILE
    if not (file.exists() and run.trained_folder.is_dir()):
        return None
    try:
        content = read_json(file)
        if content["version"] != VERSION or content["trained"] != checksum(run.trained, *IDENTITY):
            return None
        layers = [
            LayerSpectrum(**{**each, **{name: tuple(each[name]) for name in ("shape", "singular_values")}})
            for each in content["layers"]
        ]
        if not layers or not all(math.isfinite(each.entropy + each.stable_rank + each.norm) for each in layers):
            raise ValueError
        return Spectrum(content["method"], content["recipe"], content["seed"], content["trained"], layers)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file} is damaged; delete it and run `sora-hw spectrum {run.path}`") from None


def _write_spectrum(run: FinishedRun, spectrum: Spectrum) -> None:
    """Write spectrum.json into the run's folder, whole or not at all. Raises UserError where it cannot be written."""
    means = {"mean_entropy": spectrum.mean_entropy, "mean_stable_rank": spectrum.mean_stable_rank}
    content = {"version": VERSION, **asdict(spectrum), **means}
    write_whole(run.path / FILE, json.dumps(content, allow_nan=False) + "\n")


def show_spectra(folders: Sequence[Path], output: Path | None, console: Console, model: str | None = None) -> None:
    """Compute the spectra of the runs in `folders`, runs or sweeps, print them in a table, and draw the figures.

    output: the folder for the figures; by default that of a single run, and runs/spectra for several.
    model: the base model of all of them, where it has moved from where their run.json names it.

    Raises UserError where there is no run, or what one has trained or its base model is missing or damaged.
    """
    runs = [run for run in read_runs(folders, model) if not _left_out(run, console)]
    if not runs:
        raise UserError("none of the runs has finished: there is nothing whose spectrum could be computed")
    output = output or (runs[0].path if len(runs) == 1 else RUNS / "spectra")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: the folder cannot be made ({error.strerror})") from None
    spectra = [(run, spectrum_of(run, console)) for run in runs]
    series = _series(spectra)
    console.print(_table(series))
    try:
        drawn = draw_all(series, output)
    except OSError as error:
        raise UserError(f"--output {output}: the figures cannot be written ({error.strerror})") from None
    for file in drawn:
        console.print(f"{file}")


def _left_out(run: FinishedRun, console: Console) -> bool:
    unfinished = run.status != "finished"
    if unfinished:
        why = "has diverged" if run.status == "diverged" else "is unfinished"
        console.print(f"{run.path}: {why}, left out")
    return unfinished


def spectrum_of(run: FinishedRun, console: Console) -> Spectrum:
    """The spectrum of what the run has trained, written into its folder; the one there, if that is what it is of.

    Raises UserError as `layer_spectra` does.
    """
    started = time.monotonic()
    trained = run.trained
    how = "known"
    if (spectrum := read_spectrum(run)) is None:
        with _progress(run, console) as watch:
            layers = layer_spectra(run, watch)
        spectrum = Spectrum(run.recipe.method, run.recipe.name, run.recipe.seed, checksum(trained, *IDENTITY), layers)
        _write_spectrum(run, spectrum)
        how = f"{time.monotonic() - started:.1f} s"
    console.print(
        f"{run.path}: entropy {spectrum.mean_entropy:.3f}, stable rank {spectrum.mean_stable_rank:.2f}, mean of "
        f"{len(spectrum.layers)} layers ({spectrum.layers[0].computed}, {how})"
    )
    return spectrum


@contextmanager
def _progress(run: FinishedRun, console: Console) -> Iterator[Watch]:
    """A bar on a terminal, now and then a line elsewhere."""
    if console.is_terminal:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task(escape(run.path.name))
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    printed = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal printed
        if time.monotonic() - printed > PLAIN_SECONDS:
            printed = time.monotonic()
            console.print(f"{run.path}: layer {done} of {total}")

    yield line


def _series(spectra: Sequence[tuple[FinishedRun, Spectrum]]) -> list[Series]:
    """The runs that differ in their seed alone together, in the order of the methods.

    Where a method was run in several settings on a task, each is named by what it differs in.
    """
    settings: dict[Recipe, list[Spectrum]] = {}
    for run, spectrum in spectra:
        settings.setdefault(replace(run.recipe, seed=0), []).append(spectrum)
    series = []
    for recipe in sorted(settings, key=lambda recipe: list(COLOURS).index(recipe.method)):
        others = [other for other in settings if (other.name, other.method) == (recipe.name, recipe.method)]
        differing = [
            field.name
            for field in fields(recipe)
            if any(getattr(other, field.name) != getattr(recipe, field.name) for other in others)
        ]
        note = ", ".join(f"{name.replace('_', ' ')} {getattr(recipe, name)}" for name in differing)
        task = recipe.name.removeprefix("glue-")
        series.append(Series(recipe.method, note, task, [spectrum.layers for spectrum in settings[recipe]]))
    return series


def _table(series: Sequence[Series]) -> Table:
    """A row for every setting: means over the layers, and over the seeds with their standard deviation."""
    table = Table(title="singular values of what was learned, mean of the layers", title_justify="left")
    for column in ("task", "method", "seeds", "entropy", "stable rank"):
        table.add_column(column)
    for each in series:
        spreads = [_shown(each.means(attribute)) for attribute in ("entropy", "stable_rank")]
        table.add_row(Text(each.task), Text(each.label), str(len(each.runs)), *spreads)
    return table


def _shown(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean
