"""The prompts equal LLM-Adapters' templates, written out here with every space visible."""

from sora_hw.data.prompts import prompt, training_text
from sora_hw.data.records import Record

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
