"""The page of one run: how it went, what it scored, what it has done to the weights, and how to repeat it."""

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields
from itertools import cycle

from sora_hw.analysis.figures import COLOURS
from sora_hw.analysis.spectrum import LayerSpectrum
from sora_hw.finished.comparison import compare_runs
from sora_hw.finished.report.charts import Chart, Line, Point
from sora_hw.finished.report.measured import Measured
from sora_hw.finished.report.page import (
    Bar,
    Bars,
    Block,
    Cards,
    Code,
    Details,
    Grid,
    Note,
    Page,
    Scores,
    Section,
    Side,
    shown,
    table_of,
)
from sora_hw.finished.run import FinishedRun
from sora_hw.finished.spectra import Spectrum
from sora_hw.recipes.recipe import DATA, MODEL, OPTIMISATION, RUN

BLOCK = "block of the model"
SECOND = COLOURS["post_ortho"]  # beside the method's own colour
PLAIN = COLOURS["full"]
NO_LOSSES = "No losses yet: they are written with the first checkpoint."
NOTHING_TRAINED = "Nothing yet: only a run that has finished leaves an adapter or a model."
NO_SPEED = "The log of this run holds no throughput and no memory; the runs of this version do."


def page_of(run: FinishedRun) -> Page:
    """The page. Raises UserError for a damaged file."""
    measured = Measured(run)
    sections = [
        Section("Key figures", [Cards(measured.cards)]),
        Section("Training", list(_training(measured))),
        Section("Scores", list(_scores(measured))),
        Section("What it has done to the weights", list(_spectra(measured))),
        Section("Configuration", [Side(_recipe(run), flow=True)]),
        Section("To repeat it", list(_origin(run))),
    ]
    manifest = run.manifest
    facts = [run.recipe.name, manifest.get("device_name"), _minute(manifest.get("started")), run.path]
    subtitle = " · ".join(str(fact) for fact in facts if fact)
    state = run.status if run.status in ("finished", "diverged") else "unfinished"
    return Page(
        f"{measured.method} on {measured.model}", subtitle, sections, measured.colour, state, _warning(measured)
    )


def _minute(time: object) -> str:
    """ "2026-11-26 18:20 UTC" of run.json's time."""
    return f"{time[:16].replace('T', ' ')} UTC" if isinstance(time, str) else ""


def _warning(measured: Measured) -> str:
    done, planned = measured.steps
    if measured.run.status == "diverged":
        where = f" at step {measured.not_finite:,}" if measured.not_finite else ""
        return (
            f"This run has diverged: its loss was no longer finite{where}, and no adapter was saved. A smaller "
            "--learning-rate or more --warmup-steps may help."
        )
    if measured.run.status != "finished":
        return (
            "This run has not finished: it is still going on, or was stopped. Shown is what its newest checkpoint "
            f"knows (step {done:,} of {planned or '?'}); --resume goes on from there."
        )
    return ""


def _training(measured: Measured) -> Iterator[Block]:
    losses, own = measured.curve("loss"), measured.colour
    if not losses:
        yield Note(NO_LOSSES)
        return
    lines = [Line("training", losses, own)]
    if validation := measured.curve("eval_loss"):
        lines.append(Line("validation", validation, SECOND if own != SECOND else PLAIN, dots=True))
    step = "optimiser step"
    charts = [
        Chart("Loss", measured.loss_unit, step, lines, may_log=True, wide=True),
        Chart("Learning rate", "AdamW", step, [Line("learning rate", measured.curve("learning_rate"), PLAIN)], True),
    ]
    speeds, memory = measured.curve("tokens_per_second"), measured.curve("peak_memory_gib")
    if speeds and memory:
        charts += [
            Chart("Throughput", "tokens/s", step, [Line("throughput", speeds, own)], True, show="{:,.0f}".format),
            Chart("Peak memory so far", "GiB on rank 0", step, [Line("memory", memory, own)], True),
        ]
    gradients = Line("gradient norm", measured.curve("grad_norm"), PLAIN)
    charts.append(Chart("Gradient norm", "before clipping", step, [gradients], may_log=True))
    yield Side([chart for chart in charts if chart.has_values])
    if not (speeds and memory):
        yield Note(NO_SPEED)


def _scores(measured: Measured) -> Iterator[Block]:
    found = compare_runs([measured.run])
    yield from map(Scores, found)
    if demo := measured.run.results.get("embedded_questions"):
        bars = [
            Bar(label, demo[name], f"{demo[name]:.1%}", colour)
            for label, name, colour in (
                ("by chance", "chance", PLAIN),
                ("before", "before", PLAIN),
                ("after", "after", measured.colour),
            )
        ]
        yield Bars(f"{demo['questions']} held-out questions, answered correctly", bars)
    if measured.run.status != "finished":
        yield Note(NOTHING_TRAINED)
    elif not found:
        command = f"python launchers/score.py --adapter {shlex.quote(str(measured.run.path))}"
        yield Note("No scores beside the paper's yet. To score the run:", command)


def _spectra(measured: Measured) -> Iterator[Block]:
    spectrum = measured.spectrum
    if measured.run.status != "finished":
        yield Note(NOTHING_TRAINED)
        return
    if spectrum is None:
        yield Note("No spectra yet. To compute them:", f"sora-hw spectrum {shlex.quote(str(measured.run.path))}")
        return
    yield Side(
        [
            Chart("Singular-value entropy", "nats", BLOCK, _by_kind(spectrum, "entropy"), from_zero=True),
            Chart("Stable rank", "of dW", BLOCK, _by_kind(spectrum, "stable_rank"), from_zero=True),
            Chart(
                "Singular values",
                "of the layer's largest",
                "number of the singular value",
                _extremes(spectrum, measured.colour),
                may_log=True,
            ),
        ]
    )
    rows = [
        [layer.name, " x ".join(map(str, layer.shape)), *(f"{value:#.4g}" for value in _numbers(layer))]
        for layer in spectrum.layers
    ]
    header = ["layer", "shape", "entropy, nats", "stable rank", "norm of dW"]
    yield Details("Every layer", [Grid(header, rows)])


def _numbers(layer: LayerSpectrum) -> tuple[float, float, float]:
    return layer.entropy, layer.stable_rank, layer.norm


def _by_kind(spectrum: Spectrum, attribute: str) -> list[Line]:
    """A line over the model's blocks for each place that a layer has in them."""
    kinds: dict[str, list[Point]] = {}
    for layer in spectrum.layers:
        block, kind = layer.place
        kinds.setdefault(kind, []).append((block, getattr(layer, attribute)))
    return [
        Line(kind, sorted(points), colour) for (kind, points), colour in zip(kinds.items(), cycle(COLOURS.values()))
    ]


def _extremes(spectrum: Spectrum, own: str) -> list[Line]:
    """The singular values of the layers of the lowest, the middle and the highest entropy."""
    ordered = sorted(spectrum.layers, key=lambda layer: layer.entropy)
    chosen = {"lowest entropy": ordered[0], "median": ordered[len(ordered) // 2], "highest": ordered[-1]}
    colours = (PLAIN, own, SECOND if own != SECOND else COLOURS["lora"])
    lines = []
    for (label, layer), colour in zip(chosen.items(), colours, strict=True):
        sigma = [value for value in layer.singular_values if value > 0]
        shares = [(index, value / sigma[0]) for index, value in enumerate(sigma, 1)]
        lines.append(Line(f"{label}: {layer.name}", shares, colour))
    return lines


def _recipe(run: FinishedRun) -> list[Block]:
    """The recipe's values, grouped as in the launcher's --help."""
    grids = []
    for group in (MODEL, DATA, RUN, OPTIMISATION):  # by height, for three columns
        names = [field.name for field in fields(run.recipe) if field.metadata.get("group") == group]
        grids.append(table_of({name.replace("_", " "): getattr(run.recipe, name) for name in names}, group))
    return grids


def _origin(run: FinishedRun) -> Iterator[Block]:
    """What else decides the run's numbers, most of it behind a click."""
    manifest = run.manifest
    data: Mapping[str, object] = manifest.get("data") or {}
    facts = {
        "git commit": manifest.get("git_commit"),
        "training data, SHA-256": data.get("checksum"),
        "training samples": data.get("training_samples"),
        "validation samples": data.get("validation_samples"),
        "cut at the longest length": data.get("truncated"),
        "left out": data.get("left_out"),
        "started": manifest.get("started"),
        "finished": manifest.get("finished"),
        "resumed from": manifest.get("resumed_from"),
    }
    yield table_of(facts)
    yield Code("The launcher's arguments", shlex.join(map(str, manifest.get("argv") or [])) or shown(None))
    hardware = {"device": manifest.get("device_name"), "kernels": manifest.get("kernels")}
    hardware |= {**(manifest.get("profile") or {}), **(manifest.get("batch") or {})}
    hardware.pop("environment", None)
    yield Details(
        "Hardware, versions, environment, DeepSpeed",
        [
            Side(
                [
                    table_of({name.replace("_", " "): value for name, value in hardware.items()}, "hardware"),
                    table_of(manifest.get("versions") or {}, "versions"),
                    table_of(manifest.get("environment") or {}, "variables that the run has set"),
                    table_of(manifest.get("device_settings") or {}, "settings of the device"),
                ],
                flow=True,
            ),
            Code("DeepSpeed's configuration", json.dumps(manifest.get("deepspeed") or {}, indent=2)),
        ],
    )
