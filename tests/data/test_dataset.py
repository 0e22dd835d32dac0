"""Tokens, labels, cuts, the held-out split and the order of samples."""

import hashlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast

from sora_hw.data.dataset import IGNORED, checksum, draw, sample_order, split, tokenise, tokenise_sentences
from sora_hw.data.glue import SentenceRecord
from sora_hw.data.prompts import prompt, training_text
from sora_hw.data.records import Record
from sora_hw.errors import DataError

RECORDS = [Record(f"Question {n}?", "", f"the correct answer is {n}", str(n), id=f"q{n}") for n in range(20)]
BOS, EOS = 256, 257
CLS, SEP, PAD = 100, 101, 102


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


def word_tokenizer(tells_apart: bool = True) -> PreTrainedTokenizerFast:
    """One token per word "0" to "99", in [CLS] A [SEP] B [SEP], whose second sentence has the token type 1."""
    vocabulary = {str(number): number for number in range(100)} | {"[CLS]": CLS, "[SEP]": SEP, "[PAD]": PAD}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        model_input_names=names if tells_apart else [name for name in names if name != "token_type_ids"],
    )


def sentence(numbers) -> str:
    return " ".join(map(str, numbers))


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


def test_a_sentence_and_a_pair_as_the_tokenizer_puts_them_together():
    single = [SentenceRecord("1 2 3", None, 1, "a"), SentenceRecord("4", None, 0, "b")]
    samples = tokenise_sentences(single, word_tokenizer(tells_apart=False), max_length=10)
    assert [samples[0], samples[1]] == [
        {"input_ids": [CLS, 1, 2, 3, SEP], "labels": 1},
        {"input_ids": [CLS, 4, SEP], "labels": 0},
    ]
    assert (len(samples), samples.ids, samples.shortest) == (2, ["a", "b"], 3)
    pairs = [SentenceRecord("1 2", "3", 3.8, "a"), SentenceRecord("", "4 5", 0.0, "b")]
    samples = tokenise_sentences(pairs, word_tokenizer(), max_length=10)
    assert [samples[0], samples[1]] == [
        {"input_ids": [CLS, 1, 2, SEP, 3, SEP], "labels": 3.8, "token_type_ids": [0, 0, 0, 0, 1, 1]},
        {"input_ids": [CLS, SEP, 4, 5, SEP], "labels": 0.0, "token_type_ids": [0, 0, 1, 1, 1]},
    ]
    assert (samples.truncated, samples.left_out, samples.shortest) == (0, 0, 5)


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=5), st.integers(5, 20))
def test_the_longer_sentence_of_a_pair_is_cut_first(sizes, max_length):
    wholes = [(list(range(1, 1 + first)), list(range(50, 50 + second))) for first, second in sizes]
    records = [SentenceRecord(sentence(first), sentence(second), 0) for first, second in wholes]
    samples = tokenise_sentences(records, word_tokenizer(), max_length)
    for index, (first, second) in enumerate(wholes):
        tokens = samples[index]["input_ids"]
        end = tokens.index(SEP)
        kept, other = tokens[1:end], tokens[end + 1 : -1]
        assert (kept, other) == (first[: len(kept)], second[: len(other)]), "cut at their ends"
        assert len(tokens) == min(max_length, len(first) + len(second) + 3)
        for cut, whole, beside in ((kept, first, other), (other, second, kept)):
            assert len(cut) == len(whole) or len(cut) >= len(beside) - 1, "no sentence is cut below the other"
    lengths = [len(first) + len(second) + 3 for first, second in wholes]
    assert samples.truncated == sum(length > max_length for length in lengths)
    assert samples.shortest == min(lengths)


def test_sentences_are_padded_by_the_tokenizers_own_collator():
    tokenizer = word_tokenizer()
    records = [SentenceRecord("1 2 3", "4", 2.5), SentenceRecord("5", "6", 0.0)]
    samples = tokenise_sentences(records, tokenizer, max_length=10)
    batch = DataCollatorWithPadding(tokenizer)([samples[0], samples[1]])
    assert batch["input_ids"].tolist() == [[CLS, 1, 2, 3, SEP, 4, SEP], [CLS, 5, SEP, 6, SEP, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1] * 5 + [0] * 2]
    assert batch["token_type_ids"].tolist()[0] == [0] * 5 + [1] * 2
    assert batch["labels"].tolist() == [2.5, 0.0]


@pytest.mark.parametrize(("second", "least"), [(None, 3), ("1 2 3", 5)])
def test_a_length_without_room_for_text_is_refused(second, least):
    records = [SentenceRecord("1 2 3", second, 1)]
    assert len(tokenise_sentences(records, word_tokenizer(), least)[0]["input_ids"]) == least
    with pytest.raises(DataError, match=f"maximum length of {least - 1} tokens leaves no room .*raise --max-length"):
        tokenise_sentences(records, word_tokenizer(), least - 1)


def test_a_subset_is_drawn_by_the_seed_and_keeps_the_order():
    drawn = draw(RECORDS, 7, seed=1)
    assert len(drawn) == 7 and drawn == [record for record in RECORDS if record in drawn]
    assert draw(RECORDS, 7, seed=1) == drawn != draw(RECORDS, 7, seed=2)
    assert draw(RECORDS, None, seed=1) == draw(RECORDS, 20, seed=1) == draw(RECORDS, 99, seed=1) == RECORDS


def test_a_subset_is_the_same_for_ever():
    assert [record.id for record in draw(RECORDS, 5, seed=42)] == ["q5", "q8", "q10", "q11", "q19"]


def test_every_record_is_drawn_equally_often():
    counts = Counter(record.id for seed in range(2000) for record in draw(RECORDS, 5, seed))
    assert len(counts) == 20
    assert all(400 < count < 600 for count in counts.values()), "500 each, give or take 5 standard deviations"


def test_sentences_are_drawn_and_split_as_well():
    records = [SentenceRecord(str(number), None, number % 2, f"s{number}") for number in range(9)]
    training, validation = split(draw(records, 8, seed=3), 2, seed=3)
    assert (len(training), len(validation)) == (6, 2)
    assert {*training, *validation} < {*records}


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


def test_the_checksum_of_sentences():
    records = [SentenceRecord("é", None, 1, "a"), SentenceRecord("x", "y", 3.8, "b")]
    lines = '["é", null, 1]\n["x", "y", 3.8]\n'
    assert checksum(records) == hashlib.sha256(lines.encode()).hexdigest()
