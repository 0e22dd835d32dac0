"""What scoring a task means, whichever the protocol: records are answered in batches, each on its own."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from sora_hw.evaluation.tasks import Task


class Scorer(ABC):
    """One task under one protocol, for one model.

    What is predicted for a record depends on that record alone, so that batches and ranks may take them in any order.

    Attributes:
        task: the task.
        lengths: how long each record is; records of like length make a batch with little padding.
        metrics: which fields of a prediction say whether it is right.
        fingerprint: SHA-256 of all that is asked, and of the right answers.
    """

    task: Task
    lengths: Sequence[int]
    metrics: tuple[str, ...]
    fingerprint: str

    @abstractmethod
    def predict(self, batch: Sequence[int]) -> list[dict[str, object]]:
        """Predictions for the records of these numbers, in JSON's types; a field of `metrics` is true or false."""
