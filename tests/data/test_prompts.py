"""The prompts equal LLM-Adapters' templates, written out here with every space visible."""

import gzip
import json

import pytest

from sora_hw.data.prompts import prompt, training_text
from sora_hw.data.records import Record, read_records

S = " "
PLAIN = Record("Is ice cold?", "", "the correct answer is true", "true")
WITH_INPUT = Record("Is it cold?", "Ice.", "the correct answer is true", "true")


def test_without_input():
    for for_training, spaces in ((True, 2), (False, 1)):
        assert prompt(PLAIN, for_training).split("\n") == [
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            + S * spaces,
            "",
            "                ### Instruction:",
            "                Is ice cold?",
            S * 16,
            "                ### Response:",
            S * 16,
        ]


def test_with_input():
    for for_training in (True, False):
        assert prompt(WITH_INPUT, for_training).split("\n") == [
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request." + S,
            "",
            "                ### Instruction:",
            "                Is it cold?",
            S * 16,
            "                ### Input:",
            "                Ice.",
            S * 16,
            "                ### Response:",
            S * 16,
        ]


def test_the_training_text_ends_with_the_output():
    assert training_text(PLAIN) == prompt(PLAIN, for_training=True) + "the correct answer is true"


@pytest.mark.shared_data
def test_a_real_file_of_math(shared_data):
    path = shared_data / "math" / "math_demo.train.jsonl.gz"
    items = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    records = read_records([path])
    assert len(records) == len(items) == 1500
    opening = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    for record, item in zip(records, items, strict=True):
        assert (record.id, record.answer, item["input"]) == (item["id"], item["answer"], "")
        blocks = ("### Instruction:", item["instruction"], "", "### Response:", item["output"])
        assert training_text(record) == f"{opening}{S * 2}\n\n" + "\n".join(S * 16 + block for block in blocks)
