"""The predictions of a scoring on disk, so that an interrupted one goes on where it stopped, on any number of ranks.

scored.json                    what they belong to: the model, and the questions of each task
generation/boolq.jsonl         one line for each record, in the records' order
generation/boolq.part-0.jsonl  rank 0's share while it is being made
scores.json                    see `scores`
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from sora_hw.errors import UserError
from sora_hw.finished.scores import FILE, GENERATION, LIKELIHOOD
from sora_hw.storage import read_json, write_whole

IDENTITY = "scored.json"


class PredictionFile:
    """The predictions of one task under one protocol, by the numbers of the records; `name` is "PROTOCOL/TASK", and
    `metrics` the fields that must say of each whether it is right."""

    def __init__(self, folder: Path, name: str, metrics: Sequence[str]):
        self.metrics = metrics
        self.name, self.whole = name, folder / f"{name}.jsonl"

    def _part(self, of: int | str) -> Path:
        return self.whole.with_name(f"{self.whole.stem}.part-{of}.jsonl")

    def gather(self) -> None:
        """Put what other ranks of an earlier start left into one part. For one rank, while nobody writes."""
        parts = sorted(self.whole.parent.glob(f"{self.whole.stem}.part-*.jsonl"))
        if parts:
            found = self.read()
            self._write(self._part("found"), sorted(found.items()))
            for part in parts:
                if part != self._part("found"):
                    part.unlink()

    def read(self) -> dict[int, dict[str, object]]:
        """All that was predicted. A line that is not whole is left out: its record is asked again."""
        found: dict[int, dict[str, object]] = {}
        for file in (self.whole, *sorted(self.whole.parent.glob(f"{self.whole.stem}.part-*.jsonl"))):
            if file.exists():
                found |= self._lines(file)
        return found

    @contextmanager
    def appending(self, rank: int) -> Iterator["Appender"]:
        """A rank's own part, to be written to."""
        self.whole.parent.mkdir(parents=True, exist_ok=True)
        with open(self._part(rank), "a", encoding="utf-8") as file:
            yield Appender(file)

    def finish(self, records: int) -> list[dict[str, object]]:
        """Put the parts together, in the order of the records, and return the predictions. For one rank.

        Raises UserError where some are missing.
        """
        found = self.read()
        if missing := set(range(records)) - found.keys():
            raise UserError(
                f"{len(missing)} of {records} predictions of {self.name} are missing in {self.whole.parent}: the "
                "ranks of all machines must see the same folder; start the same command again to complete them"
            )
        self._write(self.whole, sorted(found.items()))
        for part in self.whole.parent.glob(f"{self.whole.stem}.part-*.jsonl"):
            part.unlink()
        return [found[number] for number in range(records)]

    def _lines(self, file: Path) -> dict[int, dict[str, object]]:
        found = {}
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                prediction = json.loads(line)
                if all(isinstance(prediction[metric], bool) for metric in self.metrics):
                    found[prediction.pop("number")] = prediction
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                continue
        return found

    def _write(self, file: Path, predictions: Iterable[tuple[int, Mapping[str, object]]]) -> None:
        write_whole(file, "".join(_line(number, prediction) for number, prediction in predictions))


class Appender:
    """Writes predictions as they come; what it has written is there if the program ends the moment after."""

    def __init__(self, file):
        self.file = file

    def write(self, predictions: Iterable[tuple[int, Mapping[str, object]]]) -> None:
        self.file.write("".join(_line(number, prediction) for number, prediction in predictions))
        self.file.flush()


def _line(number: int, prediction: Mapping[str, object]) -> str:
    return json.dumps({"number": number, **prediction}, ensure_ascii=False) + "\n"


def take_folder(folder: Path, model: Mapping[str, object], questions: Mapping[str, str], overwrite: bool) -> None:
    """Make `folder` the place of a model's predictions; with `overwrite`, delete those that it holds. For one rank,
    before others write.

    model: what tells it from others, in JSON's types.
    questions: by the names of the `PredictionFile`s, what tells their questions from others.
    Raises UserError, and changes nothing, where it holds predictions of another model or for other questions, or a link
    to elsewhere.
    """
    for entry in (folder, *folder.rglob("*")):
        if entry.is_symlink():
            raise UserError(f"--output {folder}: {entry} is a link; predictions are written into no other folder")
    found, traces = _read_identity(folder), _traces(folder)
    if traces and found is None:
        raise UserError(
            f"--output {folder} holds {traces[0].name} but no {IDENTITY}: it is none of this program's, so it is left "
            "as it is; name another folder"
        )
    if overwrite:
        for trace in traces:
            shutil.rmtree(trace) if trace.is_dir() else trace.unlink()
    elif found:
        _check_same(folder, found["model"], model, "its {name} is {found}, here it is {wanted}")
        _check_same(folder, found["questions"], questions, "the questions of {name} were others")
        questions = {**found["questions"], **questions}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: the folder cannot be made ({error.strerror})") from None
    write_whole(folder / IDENTITY, json.dumps({"model": model, "questions": questions}, indent=2) + "\n")


def _read_identity(folder: Path) -> dict[str, dict[str, object]] | None:
    file = folder / IDENTITY
    if not file.exists():
        return None
    try:
        found = read_json(file)
        return {name: dict(found[name]) for name in ("model", "questions")}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file} is damaged, so what was scored is unknown; name another folder") from None


def _traces(folder: Path) -> list[Path]:
    return [entry for name in (IDENTITY, FILE, GENERATION, LIKELIHOOD) if (entry := folder / name).exists()]


def _check_same(folder: Path, found: Mapping[str, object], wanted: Mapping[str, object], said: str) -> None:
    for name in wanted:
        if name in found and found[name] != wanted[name]:
            problem = said.format(name=name, found=found[name], wanted=wanted[name])
            raise UserError(
                f"--output {folder} holds the predictions of another scoring: {problem}; name another folder, or "
                "delete them with --overwrite"
            )
