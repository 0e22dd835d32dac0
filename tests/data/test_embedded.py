"""The embedded question set and its checkpoint: fixed, fair, disjoint, small, and loadable without a network."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sora_hw.data.embedded import (
    HELDOUT_THINGS,
    KINDS,
    MODEL_PATH,
    TRAIN_THINGS,
    candidates,
    heldout_records,
    train_records,
)
from sora_hw.data.prompts import training_text
from sora_hw.data.records import Record

CHECKSUM = "3af1ac16ac74b37dafececc0e2620b09ab19ebf17810d2ecb43ffeb1bd64f06c"
SPLITS = pytest.mark.parametrize("records", [train_records(), heldout_records()], ids=["train", "heldout"])


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_PATH, local_files_only=True)


def words(text: str) -> set[str]:
    return {word.strip("?:,.") for word in text.split()}


def test_the_records_are_the_same_in_every_process():
    records = [*train_records(), *heldout_records()]
    lines = "\n".join(json.dumps([r.instruction, r.input, r.output, r.answer, r.id]) for r in records)
    assert hashlib.sha256(lines.encode()).hexdigest() == CHECKSUM


def test_the_splits_have_a_useful_size():
    assert 1000 <= len(train_records()) <= 3000
    assert 200 <= len(heldout_records()) <= 400


def test_no_heldout_thing_is_mentioned_in_training():
    assert not set(HELDOUT_THINGS) & set(TRAIN_THINGS)
    train_words = set().union(*(words(record.instruction) for record in train_records()))
    assert not train_words & set(HELDOUT_THINGS)
    assert train_words >= set(TRAIN_THINGS)


def test_no_heldout_question_asks_a_training_question():
    assert not {r.instruction for r in heldout_records()} & {r.instruction for r in train_records()}


def test_every_heldout_question_asks_about_a_heldout_thing():
    for record in heldout_records():
        assert words(record.instruction) & set(HELDOUT_THINGS), record.instruction


@SPLITS
def test_no_question_is_repeated(records):
    assert len({record.instruction for record in records}) == len(records)
    assert len({record.id for record in records}) == len(records)


@SPLITS
def test_answers_are_among_the_candidates_and_stated_in_the_output(records):
    for record in records:
        assert record.answer in candidates(record)
        assert record.output == f"the correct answer is {record.answer}"
        assert record.input == ""


@SPLITS
def test_the_answer_is_true_in_the_world_and_no_other_option_is(records):
    """Decides every question by looking its words up in KINDS, independently of how it was written."""
    kind_of = {word: kind for kind in KINDS for word in (kind.name, kind.place, *kind.things)}
    for record in records:
        question, _, listed = record.instruction.split("question: ", 1)[1].partition("\n\n")
        asked = [kind_of[word] for word in words(question).intersection(kind_of)]
        if record.answer in ("true", "false"):
            assert len(asked) == 2
            assert (asked[0] is asked[1]) == (record.answer == "true"), record.instruction
        else:
            options = listed.split("\n\n")[0].replace(":", "").split()
            right = [
                label.lower()
                for label, word in zip(options[::2], options[1::2], strict=True)
                if kind_of[word] is asked[0]
            ]
            assert right == [record.answer], record.instruction


@SPLITS
def test_a_constant_answer_scores_chance(records):
    by_format: dict[tuple[str, ...], Counter] = {}
    for record in records:
        by_format.setdefault(tuple(candidates(record)), Counter())[record.answer] += 1
    assert set(by_format) == {("true", "false"), ("answer1", "answer2"), ("answer1", "answer2", "answer3", "answer4")}
    for labels, counts in by_format.items():
        assert {counts[label] for label in labels} == {counts.total() // len(labels)}


def test_candidates_read_the_records_own_answer_format():
    text = "Please choose.\n\nOption1: Answer format: x Option2: b Answer format: option1/option2"
    assert candidates(Record(text, "", "", "option1")) == ["option1", "option2"]
    with pytest.raises(ValueError, match="Answer format"):
        candidates(Record("What?", "", "", "x", id="r1"))


def test_the_checkpoint_is_small():
    assert sum(file.stat().st_size for file in MODEL_PATH.rglob("*") if file.is_file()) < 3_000_000


def test_model_and_tokenizer_load_without_a_network():
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer;"
        "t = AutoTokenizer.from_pretrained(sys.argv[1]);"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32);"
        "assert m.config.vocab_size == len(t);"
        "assert {p.dtype for p in m.parameters()} == {torch.float32};"
        "assert torch.isfinite(m(**t('hello', return_tensors='pt')).logits).all()"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", "TRANSFORMERS_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code, str(MODEL_PATH)], check=True, env=environment, timeout=120)


def test_the_model_has_the_layers_the_recipe_adapts():
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32)
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"} <= linear
    assert model.config.max_position_embeddings >= 1024


@pytest.mark.parametrize(
    "text",
    [
        training_text(train_records()[0]),
        "",
        "  two  spaces\n\ttab\r\n",
        "Grüße, 世界! 🦜 e\u0301 \x00",
        "12345 answer4",
    ],
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)


def test_the_tokenizer_pads_on_the_right_and_ends_texts(tokenizer):
    assert tokenizer.padding_side == "right"
    assert None not in (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


@SPLITS
def test_records_are_short_in_tokens(records, tokenizer):
    assert max(len(tokenizer(training_text(record))["input_ids"]) for record in records) <= 96
