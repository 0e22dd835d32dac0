"""Values that no flag may have, on every program's command line."""

from dataclasses import fields

import pytest

from sora_hw.recipes import commonsense, glue
from sora_hw.recipes.recipe import Recipe

WORDS = ["", " ", "x", "1e", "0x10", "1,5", "--", "None", "[1]", "1;2", "../1", "\u0661\u00bd"]
NO_NUMBER = ["nan", "inf", "-inf", "1e400"]


def _numbers(recipe: Recipe) -> list[tuple[str, str]]:
    """(flag, value) for every number of the recipe, with values outside its limits."""
    wrong = []
    for field in fields(recipe):
        kind = {"int": int, "float": float, "int | None": int}.get(str(getattr(field.type, "__name__", field.type)))
        if kind is None or "group" not in field.metadata:
            continue
        values = [*NO_NUMBER, *WORDS]
        limits = field.metadata
        if kind is int:
            values += ["1.5", "1e3", "9" * 5000]
        if "least" in limits:
            values += [str(limits["least"] - 1), str(-(10**30))]
        if "above" in limits:
            values += [str(limits["above"]), "-1", "-1e-300"]
        if "below" in limits:
            values += [str(limits["below"]), str(10**30)]
        flag = "--" + field.name.replace("_", "-")
        wrong += [(flag, value) for value in values]
    return wrong


@pytest.mark.parametrize("benchmark", [commonsense, glue], ids=["commonsense", "glue"])
def test_numbers_outside_their_limits(refused, benchmark):
    given = _numbers(benchmark.recipe())
    assert len(given) > 200
    name = "commonsense" if benchmark is commonsense else "glue"
    for flag, value in given:
        assert flag.split("-")[2] in refused(name, "--backend", "cpu", f"{flag}={value}").replace("_", "-"), value


HUGE = str(10**30)
WRONG = [
    ("commonsense", "--rank", HUGE),
    ("commonsense", "--rotation-rank", HUGE),
    ("commonsense", "--global-batch", HUGE),
    ("commonsense", "--max-steps", HUGE),
    ("commonsense", "--epochs", "1e300"),
    ("commonsense", "--validation-size", HUGE),
    ("commonsense", "--micro-batch", HUGE),
    ("commonsense", "--micro-batch", "-1"),
    ("commonsense", "--micro-batch", "nan"),
    ("commonsense", "--zero-stage", "4"),
    ("commonsense", "--zero-stage", "-1"),
    ("commonsense", "--dtype", "float16"),
    ("commonsense", "--method", ""),
    ("commonsense", "--rotation", "euler"),
    ("commonsense", "--schedule", "none"),
    ("commonsense", "--learn", "all"),
    ("commonsense", "--model", ""),
    ("commonsense", "--model", "a" * 300),
    ("commonsense", "--model", "../../../../nowhere"),
    ("commonsense", "--model", "/dev/null"),
    ("commonsense", "--model", "https://user:secret@example.org/model"),
    (
        "commonsense",
        "--target-modules",
    ),
    ("commonsense", "--target-modules", ""),
    ("commonsense", "--target-modules", "*"),
    ("commonsense", "--target-modules", "("),
    ("commonsense", "--modules-to-save", ""),
    ("commonsense", "--modules-to-save", "nothing"),
    ("commonsense", "--train-data", ""),
    ("commonsense", "--train-data", "a" * 300 + ".jsonl"),
    ("commonsense", "--train-data", "https://example.org/a.jsonl"),
    ("commonsense", "--output", "a" * 300),
    ("commonsense", "--output", "/dev/null"),
    ("commonsense", "--output", "/proc/1/nothing/here"),
    ("commonsense", "--resume", "nowhere"),
    ("commonsense", "--hardware", "../4x4090"),
    ("commonsense", "--backend", "CPU"),
    ("commonsense", "--report-to", "all"),
    ("commonsense", "--no-such-flag"),
    ("commonsense", "positional"),
    ("metamath", "--rank", "0"),
    ("metamath", "--records", "0"),
    ("glue", "--task", "wnli"),
    ("glue", "--task", "../rte"),
    ("glue", "--test-data", "gone.jsonl"),
    ("score",),
    ("score", "--model", ""),
    ("score", "--model", "embedded", "--batch-size", "0"),
    ("score", "--model", "embedded", "--batch-size", "-1"),
    ("score", "--model", "embedded", "--batch-size", "nan"),
    ("score", "--model", "embedded", "--tasks", "../boolq"),
    ("score", "--model", "embedded", "--tasks"),
    ("score", "--model", "embedded", "--data", "gone"),
    ("score", "--model", "embedded", "--data", ".", "--protocol", "guess"),
    ("score", "--adapter", "gone"),
    ("score", "--adapter", "a" * 300),
    ("score", "--adapter", ".", "--model", "embedded"),
    ("sora-hw",),
    ("sora-hw", "no-such-command"),
    ("sora-hw", "doctor", "more"),
    ("sora-hw", "plan", "gsm8k"),
    ("sora-hw", "plan", "commonsense", "--rank", "0"),
    ("sora-hw", "plan", "commonsense", "--hostfile", "gone"),
    ("sora-hw", "plan", "commonsense", "--hostfile", "."),
    ("sora-hw", "generate", "gone", "question"),
    ("sora-hw", "generate", "gone", "question", "--max-new-tokens", "0"),
    ("sora-hw", "generate", "gone", "question", "--max-new-tokens", "nan"),
    ("sora-hw", "generate", "gone", ""),
    ("sora-hw", "compare", "gone"),
    ("sora-hw", "compare", "a" * 300),
    ("sora-hw", "compare", "/dev/null"),
    ("sora-hw", "compare", ".", "--format", "xml"),
    ("sora-hw", "spectrum", "gone"),
    ("sora-hw", "report", "gone"),
    ("sora-hw", "report", "/dev/null"),
    ("sora-hw", "merge", "gone", "--output", "new"),
    ("sora-hw", "merge", "gone", "--output", "."),
    ("sora-hw", "merge", "gone"),
    ("sora-hw", "export", "gone", "--output", "new"),
    ("sora-hw", "export", "gone", "--output", "/proc/nothing"),
    ("sora-hw", "export", "gone", "--output", "a" * 300),
    ("sora-hw", "import", "gone", "--output", "new"),
    ("sora-hw", "import", "/dev/null", "--output", "new"),
]


@pytest.mark.parametrize("line", WRONG, ids=lambda line: " ".join(line)[:60])
def test_a_command_line_that_cannot_be_meant(refused, line):
    program, *arguments = line
    backend = ["--backend", "cpu"] if program in ("commonsense", "metamath", "glue") else []
    refused(program, *backend, *arguments)
