"""The tasks of the paper's tables: eight of commonsense reasoning, six of arithmetic, under LLM-Adapters' names."""

from dataclasses import dataclass

COMMONSENSE, MATH = "commonsense", "math"


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: LLM-Adapters' name of its data, and ours of its data file, NAME.test.jsonl.gz.
        title: the column of the paper's table.
        kind: `COMMONSENSE` or `MATH`.
        answers: the words that LLM-Adapters looks for in an answer, for AQuA the letters; none where it is a number.
        harness: the name of lm-evaluation-harness; None where answers are generated only.
    """

    name: str
    title: str
    kind: str
    answers: tuple[str, ...] = ()
    harness: str | None = None


def _numbered(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word}{number}" for number in range(1, count + 1))


# In the order of the columns of the paper's Tables 3 and 4.
TASKS = {
    task.name: task
    for task in (
        Task("boolq", "BoolQ", COMMONSENSE, ("true", "false"), "boolq"),
        Task("piqa", "PIQA", COMMONSENSE, _numbered("solution", 2), "piqa"),
        Task("social_i_qa", "SIQA", COMMONSENSE, _numbered("answer", 5), "social_iqa"),
        Task("hellaswag", "HellaSwag", COMMONSENSE, _numbered("ending", 4), "hellaswag"),
        Task("winogrande", "WinoGrande", COMMONSENSE, _numbered("option", 2), "winogrande"),
        Task("ARC-Easy", "ARC-e", COMMONSENSE, _numbered("answer", 5), "arc_easy"),
        Task("ARC-Challenge", "ARC-c", COMMONSENSE, _numbered("answer", 5), "arc_challenge"),
        Task("openbookqa", "OBQA", COMMONSENSE, _numbered("answer", 5), "openbookqa"),
        Task("gsm8k", "GSM8K", MATH),
        Task("MultiArith", "MultiArith", MATH),
        Task("AQuA", "AQuA", MATH, tuple("ABCDE")),
        Task("SVAMP", "SVAMP", MATH),
        Task("AddSub", "AddSub", MATH),
        Task("SingleEq", "SingleEq", MATH),
    )
}
