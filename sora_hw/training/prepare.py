"""The data of a run: read, checked, tokenised and put in order, before anything is created."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from sora_hw.data.dataset import Samples, checksum, draw, sample_order, split
from sora_hw.errors import DataError
from sora_hw.training.objectives import Objective

MOST_SAMPLES = 50_000_000  # their order is held in memory


@dataclass(frozen=True)
class Prepared:
    """`order` lists the training sample of every place in every optimiser step; `checksum` covers the records of
    training and validation, `test_checksum` those that the trained model is scored on."""

    training: Samples
    validation: Samples | None
    test: Samples | None
    steps: int
    order: list[int]
    checksum: str
    test_checksum: str | None

    def tokens_of_steps(self, global_batch: int) -> list[int]:
        """The tokens of each optimiser step, over all ranks, padding not counted."""
        lengths = [len(self.training.input_ids[index]) for index in self.order]
        return [sum(lengths[start : start + global_batch]) for start in range(0, len(lengths), global_batch)]

    @property
    def _parts(self) -> list[Samples]:
        return [part for part in (self.training, self.validation, self.test) if part]

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(len(tokens) for part in self._parts for tokens in part.input_ids)

    @property
    def largest_token(self) -> int:
        """The largest token id."""
        return max(max(tokens) for part in self._parts for tokens in part.input_ids)

    def as_dict(self) -> dict[str, object]:
        """What run.json says of the data."""
        return {
            "checksum": self.checksum,
            "training_samples": len(self.training),
            "validation_samples": len(self.validation) if self.validation else 0,
            "test_samples": len(self.test) if self.test else 0,
            "test_checksum": self.test_checksum,
            "truncated": sum(part.truncated for part in self._parts),
            "left_out": sum(part.left_out for part in self._parts),
            "steps": self.steps,
        }


def prepare(objective: Objective, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Read the recipe's records and make its samples. Raises DataError for what is wrong with them."""
    recipe = objective.recipe
    if not recipe.train_data:
        raise DataError(f"{recipe.name} comes without data of its own for --model {recipe.model}: give --train-data")
    records = draw(objective.training_records(), recipe.records, recipe.seed)
    test_records = objective.test_records()
    training_records, validation_records = split(records, recipe.validation_size, recipe.seed)
    training = objective.tokenise(training_records, tokenizer)
    validation = objective.tokenise(validation_records, tokenizer) if validation_records else None
    test = objective.tokenise(test_records, tokenizer) if test_records else None
    _check_lengths([part for part in (training, validation) if part is not None], len(records), recipe.max_length)
    steps = recipe.steps(len(training))
    if steps * recipe.global_batch > MOST_SAMPLES:
        raise DataError(
            f"{steps} steps of {recipe.global_batch} samples are more than the {MOST_SAMPLES:,} that one run may take; "
            "lower --max-steps or --epochs"
        )
    order = sample_order(len(training), steps * recipe.global_batch, recipe.seed)
    test_checksum = checksum(test_records) if test_records else None
    return Prepared(training, validation, test, steps, order, checksum(records), test_checksum)


def _check_lengths(parts: list[Samples], records: int, max_length: int) -> None:
    """Something must be learned whole, and every part must hold something."""
    if sum(part.truncated for part in parts) == records:
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
