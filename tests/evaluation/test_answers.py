"""The rules by which an answer is read out of a text, each on texts whose answer is known."""

import pytest

from sora_hw.evaluation.answers import Judged, judge, letter, number, strict_letter, word
from sora_hw.evaluation.tasks import TASKS

WORDS = [
    # (task, text, the answer in it)
    ("boolq", "the correct answer is true", "true"),
    ("boolq", "  false\n\ntrue", "false"),  # several answers: the first
    ("boolq", "True", None),  # upper case: not the form that was asked for
    ("boolq", "TRUE or FALSE: true", "true"),
    ("boolq", "untrue", None),  # the authors' search finds "true" in it
    ("boolq", "it is true-ish", "true"),
    ("boolq", "", None),
    ("boolq", "the correct answer is answer1", None),  # another task's word
    ("piqa", "the correct answer is solution2", "solution2"),
    ("social_i_qa", "answer3", "answer3"),
    ("ARC-Easy", "the correct answer is answer4.", "answer4"),
    ("ARC-Easy", "answer12", None),  # not answer1, as the authors' search has it
    ("ARC-Easy", "answer12, no: answer2", "answer2"),
    ("ARC-Easy", "Answer1: a wren Answer2: a moth; so it is answer2", "answer2"),  # repeated options are no answer
    ("ARC-Easy", "not answer1 but answer3", "answer1"),  # several answers: the first
    ("ARC-Challenge", "answer5", "answer5"),
    ("ARC-Challenge", "answer6", None),
    ("hellaswag", "ending4 is right", "ending4"),
    ("hellaswag", "ending5", None),
    ("winogrande", "Option1", None),
    ("winogrande", "(option2)", "option2"),
    ("openbookqa", "I do not know", None),
]
NUMBERS = [
    ("The answer is 12", 12.0),
    ("the answer is 12.", 12.0),
    ("-3", -3.0),
    ("It falls to -3 degrees.", -3.0),
    ("the answer is: -0.5", -0.5),
    ("\u22127", -7.0),  # the typographic minus
    ("5-3", 3.0),  # a minus between numbers is no sign; the authors' search reads -3
    ("5 - 3 = 2", 2.0),
    ("x-4", 4.0),
    ("(5)-3", 3.0),
    ("3 -4", -4.0),
    ("$1,234.50", 1234.5),
    ("1,000,000 people", 1_000_000.0),
    ("3, 4 and 5", 5.0),  # several answers: the last
    ("3,4", 34.0),  # commas are removed, whatever they mean
    ("1/2", 2.0),  # the last number, not the fraction
    ("12.5%", 12.5),
    (".5 of it", 0.5),
    ("and so on...5", 5.0),
    ("1.2.3", 3.0),
    ("answer12", 12.0),
    ("no number", None),
    ("", None),
    ("-", None),
    ("9" * 400, float("inf")),
]
LETTERS = [
    # (text, by the authors' rule, by the strict one)
    ("C", "C", "C"),
    ("(D)", "D", "D"),
    ("B) 12 apples", "B", "B"),
    ("**E**", "E", "E"),
    ("The answer is B.", "B", "B"),
    ("the answer is: (C) 3/5", "C", "C"),
    ("Answer: C", "A", "C"),  # the authors' rule takes the A of "Answer"
    ("A train leaves B at noon", "A", None),
    ("A train leaves at noon, so the answer is D", "A", "D"),
    ("Answer: A train takes 3 hours, so (B)", "A", "B"),
    ("Each of them has 5. The answer is: D", "E", "D"),
    ("The answer is A. No: the answer is E", "A", "E"),  # several answers
    ("(A) or (B)", "A", None),
    ("it must be (B), yes, (B)", "B", "B"),
    ("Because of it", "B", None),
    ("b", None, None),  # lower case
    ("F", None, None),
    ("BAD", "B", None),
    ("the answer is Debatable", "D", None),
    ("42", None, None),
    ("", None, None),
]


@pytest.mark.parametrize(("task", "text", "answer"), WORDS)
def test_words(task, text, answer):
    assert word(text, TASKS[task].answers) == answer


@pytest.mark.parametrize(("text", "answer"), NUMBERS)
def test_numbers(text, answer):
    assert number(text) == answer


@pytest.mark.parametrize(("text", "authors", "strict"), LETTERS)
def test_letters(text, authors, strict):
    assert letter(text) == authors
    assert strict_letter(text) == strict


@pytest.mark.parametrize(
    ("task", "text", "gold", "judged"),
    [
        ("boolq", "the correct answer is true", "true", Judged("true", True)),
        ("boolq", "the correct answer is true", "false", Judged("true", False)),
        ("boolq", "who knows", "true", Judged(None, False)),  # no answer is wrong
        ("gsm8k", "so it is 1,200.0004 in all", "1200.0", Judged(1200.0004, True)),
        ("gsm8k", "0.9991", "1", Judged(0.9991, True)),  # within 0.001
        ("gsm8k", "0.9989", "1", Judged(0.9989, False)),
        ("gsm8k", "7", "1,007", Judged(7.0, False)),
        ("AddSub", "3", "-3", Judged(3.0, False)),
        ("AddSub", "none", "0", Judged(None, False)),
        ("SVAMP", "9" * 400, "9", Judged(float("inf"), False)),
        ("AQuA", "Answer: C", "C", Judged("A", False, Judged("C", True))),
        ("AQuA", "A train", "A", Judged("A", True, Judged(None, False))),
        ("AQuA", "no letter", "B", Judged(None, False, Judged(None, False))),
    ],
)
def test_judging(task, text, gold, judged):
    assert judge(TASKS[task], text, gold) == judged


@pytest.mark.parametrize(
    ("task", "gold", "must_be"),
    [("boolq", "yes", "one of true, false"), ("AQuA", "F", "one of A"), ("gsm8k", "ten", "a number")],
)
def test_what_cannot_be_an_answer(task, gold, must_be):
    with pytest.raises(ValueError, match=must_be):
        judge(TASKS[task], "", gold)
