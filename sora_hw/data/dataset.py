"""From records to token ids: what is learned of each, what was cut, which are held out, in which order they come."""

import hashlib
import json
import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TypeVar

from torch.utils.data import Dataset, Subset
from transformers import PreTrainedTokenizerBase

from sora_hw.data.glue import SentenceRecord
from sora_hw.data.prompts import prompt, training_text
from sora_hw.data.records import Record
from sora_hw.data.spool import IN_MEMORY
from sora_hw.errors import DataError

IGNORED = -100  # the label of a token that is read but not learned (torch.nn.CrossEntropyLoss)
PROBED = 1_000  # samples that are made at once of records that are tokenised as they are taken
Kind = TypeVar("Kind", Record, SentenceRecord)


@dataclass(frozen=True)
class _Tokenised(Dataset):
    """What the samples of every kind have in common.

    `input_ids` are the tokens of each sample, not padded, `ids` the ids of their records. `truncated` counts the
    records that were longer than the maximum length; `left_out` those among them of which nothing to be learned
    remained; `shortest` is the length of the shortest record in tokens, uncut.
    """

    input_ids: list[list[int]]
    ids: list[str]
    truncated: int
    left_out: int
    shortest: int

    def __len__(self) -> int:
        return len(self.input_ids)

    def id_of(self, index: int) -> str:
        """The record that sample `index` comes from."""
        return self.ids[index]

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(map(len, self.input_ids))

    @property
    def largest_token(self) -> int:
        """The largest token id."""
        return max(map(max, self.input_ids))


@dataclass(frozen=True)
class Samples(_Tokenised):
    """Texts to continue. Sample i is {"input_ids": list[int], "labels": list[int]} of equal, unpadded length."""

    labels: list[list[int]]

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}


@dataclass(frozen=True)
class SentenceSamples(_Tokenised):
    """Sentences to classify or to rate. Sample i is {"input_ids": list[int], "labels": int or float}.

    With "token_type_ids": list[int] where the tokenizer tells the sentences of a pair apart by them. The attention
    mask comes with the padding, from the tokenizer's `pad`.
    """

    labels: list[int | float]
    token_type_ids: list[list[int]] | None

    def __getitem__(self, index: int) -> dict[str, list[int] | int | float]:
        sample = {"input_ids": self.input_ids[index], "labels": self.labels[index]}
        if self.token_type_ids is not None:
            sample["token_type_ids"] = self.token_type_ids[index]
        return sample


class LazySamples(Dataset):
    """Samples of so many records that each is tokenised when it is taken. What only all of them together could tell,
    how many are cut and how many teach nothing, is not known: a record of which nothing to be learned remains gives its
    place to the next one.

    Raises DataError when that is so of all of the first `PROBED` records.
    """

    truncated = left_out = shortest = None

    def __init__(self, records: Sequence[Kind], max_length: int, tokenise: Callable[[Sequence[Kind]], _Tokenised]):
        self.records, self.longest, self._tokenise = records, max_length, tokenise
        probe = tokenise([records[index] for index in range(min(PROBED, len(records)))])
        if not len(probe):
            raise DataError(
                f"nothing to learn remains of the first {probe.left_out} records at a maximum length of {max_length} "
                "tokens; raise --max-length"
            )
        self.largest_token = probe.largest_token

    def __len__(self) -> int:
        return len(self.records)

    def id_of(self, index: int) -> str:
        """The record that sample `index` comes from, unless a later one has taken its place."""
        return self.records[index].id

    def __getitem__(self, index: int) -> dict[str, object]:
        while True:
            samples = self._tokenise([self.records[index]])
            if len(samples):
                return samples[0]
            index = (index + 1) % len(self)


def make_samples(
    records: Sequence[Kind], max_length: int, tokenise: Callable[[Sequence[Kind]], _Tokenised]
) -> _Tokenised | LazySamples:
    """The samples of `records` by `tokenise`, cut at `max_length`: all at once, or of too many one at a time."""
    return tokenise(records) if len(records) <= IN_MEMORY else LazySamples(records, max_length, tokenise)


def tokenise(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, max_length: int, learn: str = "text"
) -> Samples:
    """Tokens of prompt + output + end-of-text, at most `max_length` of them, as LLM-Adapters' fine-tuning makes them.

    `learn` says which tokens have labels: "text" all of them (LLM-Adapters, and so the paper), "answer" those of the
    output and the end-of-text alone.
    """
    texts = [training_text(record) for record in records]
    encoded = tokenizer(texts, return_offsets_mapping=learn == "answer", return_attention_mask=False)
    input_ids = [_ended(tokens, tokenizer.eos_token_id) for tokens in encoded["input_ids"]]
    labels = input_ids
    if learn == "answer":
        starts = [len(prompt(record, for_training=True)) for record in records]
        labels = list(map(_answer_only, input_ids, encoded["offset_mapping"], starts))
    lengths = list(map(len, input_ids))
    kept = [index for index, targets in enumerate(labels) if _teaches(targets[:max_length])]
    return Samples(
        input_ids=[input_ids[index][:max_length] for index in kept],
        labels=[labels[index][:max_length] for index in kept],
        ids=[records[index].id for index in kept],
        truncated=sum(length > max_length for length in lengths),
        left_out=len(records) - len(kept),
        shortest=min(lengths),
    )


def tokenise_sentences(
    records: Sequence[SentenceRecord], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> SentenceSamples:
    """Tokens of each sentence or pair as the tokenizer puts them together, at most `max_length` of them.

    Of a pair that is too long, the longer sentence is cut first. The records are of one task: all pairs, or none.

    Raises DataError when `max_length` leaves no room for a token of each sentence.
    """
    pairs = records[0].second is not None
    own = tokenizer.num_special_tokens_to_add(pair=pairs)
    if max_length < own + 1 + pairs:
        raise DataError(
            f"a maximum length of {max_length} tokens leaves no room for text: {own} are the tokenizer's own; "
            "raise --max-length"
        )
    texts = [[record.first for record in records]]
    if pairs:
        texts.append([record.second for record in records])
    encode = partial(tokenizer, *texts, return_attention_mask=False, verbose=False)
    lengths = list(map(len, encode()["input_ids"]))
    encoded = encode(truncation="longest_first", max_length=max_length)
    return SentenceSamples(
        input_ids=encoded["input_ids"],
        labels=[record.label for record in records],
        token_type_ids=encoded.get("token_type_ids"),
        ids=[record.id for record in records],
        truncated=sum(length > max_length for length in lengths),
        left_out=0,
        shortest=min(lengths),
    )


def _ended(tokens: list[int], end_of_text: int) -> list[int]:
    return tokens if tokens[-1] == end_of_text else [*tokens, end_of_text]


def _answer_only(tokens: list[int], offsets: list[tuple[int, int]], start: int) -> list[int]:
    """Labels for the tokens that reach beyond character `start` of the text, and for the end-of-text."""
    learned = [end > start for _, end in offsets[: len(tokens) - 1]] + [True]
    return [token if known else IGNORED for token, known in zip(tokens, learned, strict=True)]


def _teaches(labels: list[int]) -> bool:
    """Whether any label counts; the first does not, for nothing stands before it that could predict it."""
    return any(label != IGNORED for label in labels[1:])


def draw(records: Sequence[Kind], size: int | None, seed: int) -> Sequence[Kind]:
    """`size` of the records, drawn by `seed`, in their order; all where `size` is None or there are no more of them."""
    if size is None or size >= len(records):
        return records
    return _chosen(records, sorted(random.Random(f"subset {seed}").sample(range(len(records)), size)))


def split(records: Sequence[Kind], validation_size: int, seed: int) -> tuple[Sequence[Kind], Sequence[Kind]]:
    """(training records, validation records): `validation_size` of them drawn by `seed`, the rest in their order.

    Raises DataError when nothing would be left to train on.
    """
    if validation_size >= len(records):
        raise DataError(
            f"a validation split of {validation_size} records leaves nothing of {len(records)} to train on; "
            "give more data or a smaller --validation-size"
        )
    held_out = set(random.Random(f"validation {seed}").sample(range(len(records)), validation_size))
    training = [index for index in range(len(records)) if index not in held_out]
    return _chosen(records, training), _chosen(records, sorted(held_out))


def _chosen(records: Sequence[Kind], indices: Sequence[int]) -> Sequence[Kind]:
    """The records at `indices`; too many of them stay where they are."""
    if len(indices) <= IN_MEMORY:
        return [records[index] for index in indices]
    return Subset(records, array("Q", indices))


def sample_order(size: int, total: int, seed: int) -> list[int]:
    """The sample to take at each of `total` places: shuffled passes over 0 .. size-1, one after the other.

    It depends on nothing but its arguments, so a run draws the same samples for every optimiser step on any number of
    ranks. A step may take the end of one pass and the start of the next: no step is smaller than the others.
    """
    order: list[int] = []
    for epoch in count():
        if len(order) >= total:
            return order[:total]
        indices = list(range(size))
        random.Random(f"epoch {epoch} of seed {seed}").shuffle(indices)
        order += indices


def checksum(records: Sequence[Record] | Sequence[SentenceRecord]) -> str:
    """SHA-256 of what the records say, in their order; the same for one file as for its parts or its gzip.

    It covers every field but the id, in the order in which the record's class has them.
    """
    digest, encode = hashlib.sha256(), json.JSONEncoder(ensure_ascii=False).encode
    for record in records:
        fields = [value for name, value in vars(record).items() if name != "id"]
        digest.update(encode(fields).encode() + b"\n")
    return digest.hexdigest()
