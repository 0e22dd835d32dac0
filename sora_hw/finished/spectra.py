"""The spectra of what a run has learned: RUN/spectrum.json, which `sora-hw spectrum` writes and the report reads."""

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sora_hw.errors import UserError
from sora_hw.finished.run import FinishedRun

FILE = "spectrum.json"
VERSION = 1


@dataclass(frozen=True)
class LayerSpectrum:
    """Of one layer's `dW = W' - W0`.

    Attributes:
        name: the layer's full name in the model, such as model.layers.0.self_attn.q_proj.
        shape: (out, in).
        computed: "core" or "dense", see `sora_hw.analysis.spectrum`.
        entropy: of the singular values, nats.
        stable_rank: `||dW||_F^2 / ||dW||_2^2`.
        norm: `||dW||_F`.
        singular_values: descending; from a core only those that can differ from zero.
    """

    name: str
    shape: tuple[int, int]
    computed: str
    entropy: float
    stable_rank: float
    norm: float
    singular_values: tuple[float, ...]


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
    """The spectrum in the run's folder; None where there is none, or one of another version of this file.

    Raises UserError where the file is damaged.
    """
    file = run.path / FILE
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text())
        if content["version"] != VERSION:
            return None
        layers = [
            LayerSpectrum(**{**each, "shape": tuple(each["shape"]), "singular_values": tuple(each["singular_values"])})
            for each in content["layers"]
        ]
        return Spectrum(content["method"], content["recipe"], content["seed"], content["trained"], layers)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file} is damaged; delete it and run `sora-hw spectrum {run.path}` again") from None


def write_spectrum(run: FinishedRun, spectrum: Spectrum) -> None:
    """Write spectrum.json into the run's folder, whole or not at all."""
    means = {"mean_entropy": spectrum.mean_entropy, "mean_stable_rank": spectrum.mean_stable_rank}
    content = {"version": VERSION, **asdict(spectrum), **means}
    aside = run.path / f"{FILE}.part"
    aside.write_text(json.dumps(content, allow_nan=False) + "\n")
    os.replace(aside, run.path / FILE)
