"""What counts as the answer in a generated text: LLM-Adapters' rules (Hu et al., 2023), in words of our own.

- commonsense: the first of the task's answer words. As in the original, "Answer1" is none: the prompt lists the options
  under capitalised names and asks for the answer in small letters; a model that repeats the options has not answered.
  Unlike the original, which finds "answer1" in "answer12" and "true" in "untrue", only whole words count.
- numbers: commas are removed, the last number is taken ("1/2" is 2, "3,4" is 34, as in the original), and it is right
  within 0.001 of the gold one. Unlike the original, which reads "5-3" as -3, a minus behind a digit, a letter or a
  bracket is one between two numbers and not the sign of the second; and ".5" is a half.
- AQuA: the first capital letter from A to E, wherever it stands, so that "Answer: C" is A, and "A train ..." as well.
  `strict_letter` is a rule of ours beside it, for letters that were meant as an answer.

A text without an answer is wrong.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sora_hw.evaluation.tasks import MATH, Task

TOLERANCE = 1e-3  # LLM-Adapters: how far a number may be from the gold one
NUMBER = re.compile(r"(?:(?<![\w)\]])[-\u2212])?(?:\d+(?:\.\d+)?|(?<![\w.])\.\d+)")  # \u2212 is the typographic minus
LETTER = re.compile(r"[A-E]")
ARTICLE = r"(?!A\s+[a-z])"  # "A train ..."
# "the answer is (C)", "Answer: **C**", "The answer is: option C"
AFTER_ANSWER = re.compile(rf"(?i:\banswer(?:\s+is)?[\s:*(\[]*(?:option\s+|choice\s+)?)\(?{ARTICLE}([A-E])\b(?!')")
ALONE = re.compile(r"\W*([A-E])(?:[).\]:]|\W*$)")  # at the start: "C", "(C)", "C) 12", "C."
IN_BRACKETS = re.compile(r"\(([A-E])\)")


@dataclass(frozen=True)
class Judged:
    """What was found in a text and whether it is right; `extracted` is None where the text has no answer.

    `strict` is the same by our rule for letters, None for tasks that have no other rule than the original.
    """

    extracted: str | float | None
    correct: bool
    strict: "Judged | None" = None


def judge(task: Task, text: str, gold: str) -> Judged:
    """Find the answer to a question of `task` in the generated `text`, and compare it with the record's answer.

    Raises ValueError where `gold` is none of the task's answers.
    """
    check_gold(task, gold)
    if not task.answers:
        found = number(text)
        return Judged(found, found is not None and abs(found - _value(gold)) <= TOLERANCE)
    if task.kind == MATH:
        strict = strict_letter(text)
        return Judged(found := letter(text), found == gold, Judged(strict, strict == gold))
    return Judged(found := word(text, task.answers), found == gold)


def check_gold(task: Task, gold: str) -> None:
    """Raises ValueError, saying what it must be, where `gold` cannot be the answer to a question of `task`."""
    if task.answers:
        if gold not in task.answers:
            raise ValueError(f"one of {', '.join(task.answers)}")
    elif not re.fullmatch(r"[-+]?(\d+(\.\d*)?|\.\d+)", gold.replace(",", "").strip()):
        raise ValueError("a number")


def _value(gold: str) -> float:
    return float(gold.replace(",", ""))


def word(text: str, words: Sequence[str]) -> str | None:
    """The first of `words` in `text`, whole and in their own case."""
    found = re.search(rf"\b(?:{'|'.join(map(re.escape, words))})\b", text)
    return found[0] if found else None


def number(text: str) -> float | None:
    """The last number in `text`."""
    found = NUMBER.findall(text.replace(",", ""))
    return float(found[-1].replace("\u2212", "-")) if found else None


def letter(text: str) -> str | None:
    """The first capital letter from A to E in `text`, be it a word's."""
    found = LETTER.search(text)
    return found[0] if found else None


def strict_letter(text: str) -> str | None:
    """The letter that `text` gives as its answer: the last behind "answer is" or "answer:"; otherwise the one that is
    the whole text, or that begins it and is set apart ("C) 12"); otherwise the one in brackets. Of several in brackets
    none is meant."""
    if named := AFTER_ANSWER.findall(text):
        return named[-1]
    bracketed = set(IN_BRACKETS.findall(text))
    if len(bracketed) > 1:
        return None
    if alone := ALONE.match(text):
        return alone[1]
    return bracketed.pop() if bracketed else None
