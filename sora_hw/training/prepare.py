"""The data of a run: read, checked, tokenised and put in order, before anything is created."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedTokenizerBase

from sora_hw.data.dataset import LazySamples, Samples, checksum, draw, make_samples, sample_order, split
from sora_hw.errors import DataError
from sora_hw.training.objectives import Objective

MOST_SAMPLES = 50_000_000  # their order is held in memory


@dataclass(frozen=True)
class Prepared:
    """`order` lists the training sample of every place in every optimiser step; `checksum` covers the records of
    training and validation, `test_checksum` those that the trained model is scored on."""

    training: Samples | LazySamples
    validation: Samples | LazySamples | None
    test: Samples | LazySamples | None
    steps: int
    order: list[int]
    checksum: str
    test_checksum: str | None

    def tokens_of_steps(self, global_batch: int) -> "StepTokens":
        """The tokens of each optimiser step, over all ranks, padding not counted."""
        return StepTokens(self, global_batch)

    @property
    def _parts(self) -> list[Samples | LazySamples]:
        return [part for part in (self.training, self.validation, self.test) if part]

    @property
    def longest(self) -> int:
        """Tokens of the longest sample, or what it may have."""
        return max(part.longest for part in self._parts)

    @property
    def largest_token(self) -> int:
        """The largest token id, of those that are known."""
        return max(part.largest_token for part in self._parts)

    def as_dict(self) -> dict[str, object]:
        """What run.json says of the data."""
        return {
            "checksum": self.checksum,
            "training_samples": len(self.training),
            "validation_samples": len(self.validation) if self.validation else 0,
            "test_samples": len(self.test) if self.test else 0,
            "test_checksum": self.test_checksum,
            "truncated": _sum(part.truncated for part in self._parts),
            "left_out": _sum(part.left_out for part in self._parts),
            "steps": self.steps,
        }


class StepTokens(Sequence[int]):
    """The tokens of each optimiser step, counted when they are asked for."""

    def __init__(self, data: Prepared, global_batch: int):
        self._data, self._batch = data, global_batch

    def __len__(self) -> int:
        return self._data.steps

    def __getitem__(self, step: int) -> int:
        taken = self._data.order[step * self._batch : (step + 1) * self._batch]
        return sum(len(self._data.training[index]["input_ids"]) for index in taken)


def _sum(counts: Iterable[int | None]) -> int | None:
    """None where one of them is not known."""
    counts = list(counts)
    return None if None in counts else sum(counts)


def prepare(objective: Objective, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Read the recipe's records and make its samples. Raises DataError for what is wrong with them."""
    recipe = objective.recipe
    if not recipe.train_data:
        raise DataError(f"{recipe.name} comes without data of its own for --model {recipe.model}: give --train-data")
    records = draw(objective.training_records(), recipe.records, recipe.seed)
    test_records = objective.test_records()
    training_records, validation_records = split(records, recipe.validation_size, recipe.seed)
    tokenise = partial(objective.tokenise, tokenizer=tokenizer)
    training, validation, test = (
        make_samples(each, recipe.max_length, tokenise) if len(each) else None
        for each in (training_records, validation_records, test_records)
    )
    _check_lengths([part for part in (training, validation) if part is not None], len(records), recipe.max_length)
    steps = recipe.steps(len(training))
    if steps * recipe.global_batch > MOST_SAMPLES:
        raise DataError(
            f"{steps} steps of {recipe.global_batch} samples are more than the {MOST_SAMPLES:,} that one run may take; "
            "lower --max-steps or --epochs"
        )
    order = sample_order(len(training), steps * recipe.global_batch, recipe.seed)
    test_checksum = checksum(test_records) if len(test_records) else None
    return Prepared(training, validation, test, steps, order, checksum(records), test_checksum)


def _check_lengths(parts: list[Samples | LazySamples], records: int, max_length: int) -> None:
    """Something must be learned whole, and every part must hold something."""
    if _sum(part.truncated for part in parts) == records:
        shortest = min(part.shortest for part in parts)
        raise DataError(
            f"every record is longer than the maximum length of {max_length} tokens (the shortest has {shortest}); "
            "raise --max-length"
        )
    for part, what in zip(parts, ("training", "validation"), strict=False):
        if not len(part):
            raise DataError(
                f"nothing to learn remains of the {part.left_out} {what} records at a maximum length of {max_length} "
                "tokens; raise --max-length"
            )
