"""The scores of a run on disk: RUN/scores/scores.json, which scoring writes and tables, comparison and report read."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sora_hw.errors import UserError
from sora_hw.evaluation.tasks import TASKS
from sora_hw.storage import read_json, write_whole

FOLDER, FILE = "scores", "scores.json"
LIKELIHOOD, GENERATION = "likelihood", "generation"  # protocols: the harness' log-likelihoods; LLM-Adapters' answers
ACCURACY, NORMALISED, STRICT = "accuracy", "accuracy normalised by length", "strict accuracy"  # metrics


@dataclass(frozen=True)
class Score:
    """One number: a share between 0 and 1 of `records`.

    `task` is a name of `sora_hw.evaluation.tasks`.
    """

    protocol: str
    task: str
    metric: str
    value: float
    records: int


def write_scores(folder: Path, scores: Sequence[Score], facts: Mapping[str, object]) -> None:
    """Write scores.json into `folder`, whole or not at all; `facts` say what was scored, where, and on which data."""
    content = {**facts, "scores": [asdict(score) for score in scores]}
    write_whole(folder / FILE, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_scores(folder: Path) -> list[Score]:
    """The scores in `folder`; none where it has not been scored. Raises UserError where the file is damaged."""
    file = folder / FILE
    if not file.exists():
        return []
    try:
        scores = [Score(**score) for score in read_json(file)["scores"]]
        if all(map(_can_be, scores)):
            return scores
        raise ValueError
    except (OSError, ValueError, OverflowError, KeyError, TypeError):
        raise UserError(f"{file} is damaged; score the run again") from None


def _can_be(score: Score) -> bool:
    known = score.protocol in (LIKELIHOOD, GENERATION) and score.metric in (ACCURACY, NORMALISED, STRICT)
    return known and score.task in TASKS and math.isfinite(score.value) and score.records > 0


def read_facts(folder: Path) -> dict[str, object]:
    """What `write_scores` was told beside the scores; empty where there are none. Raises UserError as `read_scores`."""
    file = folder / FILE
    if not file.exists():
        return {}
    try:
        return {name: value for name, value in read_json(file).items() if name != "scores"}
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{file} is damaged; score the run again") from None
