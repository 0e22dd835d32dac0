"""What reaches a terminal of any text."""

import io
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from rich.table import Table
from rich.text import Text

from sora_hw import cli
from sora_hw.errors import printable
from sora_hw.terminal import Console

CLEARING = "\x1b[2J\x9b2J\r\x07\x7f"
HARMLESS = r"\x1b[2J\x9b2J\r\x07\x7f"


def shown(*renderables, **options) -> str:
    console = Console(file=io.StringIO(), width=200, **options)
    for renderable in renderables:
        console.print(renderable)
    return console.file.getvalue()


def grid(*cells) -> Table:
    table = Table("a column", title=cells[0])
    table.add_row(*cells)
    return table


@pytest.mark.parametrize("make", [str, Text, grid, lambda text: grid(Text(text))], ids=["str", "text", "cell", "both"])
def test_a_text_is_no_command_to_the_terminal(make):
    """rich itself drops some control characters, and lets the escape pass."""
    printed = shown(make(f"é {CLEARING} z"))
    assert r"é \x1b[2J\x9b2J" in printed
    assert [each for each in printed if not each.isprintable() and each != "\n"] == []


def test_styles_and_lines_are_kept():
    printed = shown(Text("one\ntwo", style="red"), force_terminal=True, color_system="standard")
    assert printed == "\x1b[31mone\x1b[0m\n\x1b[31mtwo\x1b[0m\n"


@pytest.mark.parametrize("text", ["[/x]", "[red]a", ":smile:", "x\u3000y z", "日本"])
def test_a_text_is_printed_as_it_is(text):
    assert shown(text) == text + "\n"
    assert text in shown(grid(text))


@pytest.mark.parametrize("terminal", [True, False])
def test_a_model_s_answer_is_no_command_to_the_terminal(monkeypatch, terminal):
    """A file gets it as it is, tabs and all."""
    file = io.StringIO()
    file.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setattr("sora_hw.finished.generate.generate", lambda *given: [f"{CLEARING}\ttwo\n"])
    asked = SimpleNamespace(questions=["?"], max_new_tokens=9, model=None, folder=None, backend="cpu")
    assert cli.generate(asked, Console(file=file, width=99)) == 0
    printed = file.getvalue()
    if terminal:
        assert r"\x1b[2J\x9b2J" in printed and printed.replace("\n", "").isprintable()
    else:
        assert printed == f"{CLEARING}\ttwo\n\n"


def test_printable():
    assert printable(f"é {CLEARING}\u3000z") == f"é {HARMLESS}\u3000z"


CHECK = """
import sys
from sora_hw.terminal import Console, print_anything
from rich.table import Table
print_anything()
table = Table("é")
table.add_row("0.50 ± 0.10")
Console().print(table)
print("±", "\\udcff", "z")
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_no_character_ends_a_program(encoding):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.decode(encoding)
    wanted = "±" if encoding != "ascii" else "?"
    assert f"0.50 {wanted} 0.10" in printed and f"{wanted} ? z" in printed
    assert printed.isascii() or encoding != "ascii"
