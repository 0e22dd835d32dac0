"""Tokens, labels, cuts, the held-out split and the order of samples."""

import hashlib
from collections import Counter

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sora_hw.data.dataset import IGNORED, checksum, sample_order, split, tokenise
from sora_hw.data.prompts import prompt, training_text
from sora_hw.data.records import Record
from sora_hw.errors import DataError

RECORDS = [Record(f"Question {n}?", "", f"the correct answer is {n}", str(n), id=f"q{n}") for n in range(20)]
BOS, EOS = 256, 257


def byte_tokenizer(adds_end: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, <s> in front, and on request </s> behind, as some tokenizers do by themselves."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)} | {"<s>": BOS, "</s>": EOS}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if adds_end else "<s> $A", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("adds_end", [False, True])
def test_a_sample_is_the_text_and_one_end_of_text(adds_end):
    tokenizer = byte_tokenizer(adds_end)
    samples = tokenise(RECORDS, tokenizer, max_length=1000)
    assert samples.ids == [record.id for record in RECORDS]
    assert samples.truncated == samples.left_out == 0
    for index, record in enumerate(RECORDS):
        tokens = samples[index]["input_ids"]
        assert tokens[0] == BOS and tokens[-1] == EOS and tokens.count(EOS) == 1
        assert tokenizer.decode(tokens[1:-1]) == training_text(record)
        assert samples[index]["labels"] == tokens


@pytest.mark.parametrize("adds_end", [False, True])
def test_learning_the_answer_alone_ignores_the_prompt(adds_end):
    tokenizer = byte_tokenizer(adds_end)
    samples = tokenise(RECORDS, tokenizer, max_length=1000, learn="answer")
    for index, record in enumerate(RECORDS):
        labels = samples[index]["labels"]
        size = 1 + len(prompt(record, for_training=True))
        assert labels[:size] == [IGNORED] * size
        assert tokenizer.decode(labels[size:-1]) == record.output
        assert labels[-1] == EOS


def test_long_records_are_cut_and_counted():
    whole = tokenise(RECORDS, byte_tokenizer(), max_length=1000)
    limit = len(whole[0]["input_ids"])  # the numbers from 10 on make a record two bytes longer
    samples = tokenise(RECORDS, byte_tokenizer(), max_length=limit)
    assert samples.truncated == 10 and samples.left_out == 0
    assert [len(tokens) for tokens in samples.input_ids] == [limit] * 20
    assert samples[15]["input_ids"] == whole[15]["input_ids"][:limit]


def test_a_record_whose_answer_was_cut_off_has_nothing_to_teach():
    long = Record("x" * 500, "", "the correct answer is 1", "1", id="long")
    samples = tokenise([*RECORDS, long], byte_tokenizer(), max_length=400, learn="answer")
    assert samples.truncated == samples.left_out == 1
    assert "long" not in samples.ids and len(samples) == 20


def test_the_shortest_record_is_measured_before_it_is_cut():
    samples = tokenise(RECORDS, byte_tokenizer(), max_length=50)
    assert samples.truncated == len(RECORDS)
    assert samples.shortest == min(len(training_text(record)) for record in RECORDS) + 2


def test_the_split_is_a_partition_fixed_by_the_seed():
    training, validation = split(RECORDS, 5, seed=1)
    assert len(validation) == 5 and len(training) == 15
    assert {record.id for record in training + validation} == {record.id for record in RECORDS}
    assert split(RECORDS, 5, seed=1) == (training, validation)
    assert split(RECORDS, 5, seed=2)[1] != validation
    assert split(RECORDS, 0, seed=1) == (RECORDS, [])
    with pytest.raises(DataError, match="smaller --validation-size"):
        split(RECORDS, 20, seed=1)


def test_the_order_visits_every_sample_once_per_pass():
    order = sample_order(7, 30, seed=3)
    passes = [order[start : start + 7] for start in range(0, 28, 7)]
    assert all(sorted(each) == list(range(7)) for each in passes)
    assert len({tuple(each) for each in passes}) == 4, "every pass is shuffled anew"
    assert max(Counter(order).values()) == 5
    assert order != sample_order(7, 30, seed=4)
    assert sample_order(7, 60, seed=3)[:30] == order, "a longer run starts with the same samples"


def test_the_order_is_the_same_for_ever():
    """Pinned: a resumed run must draw what the interrupted one would have drawn."""
    assert sample_order(5, 12, seed=42) == [0, 3, 4, 1, 2, 2, 4, 3, 0, 1, 0, 4]


def test_the_checksum_sees_every_field_and_no_ids():
    record = Record('say "ü"', "b", "c", "d", id="1")
    line = '["say \\"ü\\"", "b", "c", "d"]\n'
    assert checksum([record]) == hashlib.sha256(line.encode()).hexdigest()
    assert checksum([record, record]) == hashlib.sha256((line * 2).encode()).hexdigest()
    changed = [Record(*fields) for fields in (("A", "b", "c", "d"), ("a", "", "bc", "d"), ("a", "b", "c", "e"))]
    assert len({checksum([each]) for each in changed}) == 3
