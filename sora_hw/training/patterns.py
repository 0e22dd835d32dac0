"""Regular expressions from strangers, which PEFT matches with the name of every layer: some would take years."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping

LONGEST = 10  # seconds; honest ones take milliseconds
FIELDS = (
    *("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "target_parameters"),
    *("rank_pattern", "alpha_pattern", "trainable_token_indices"),
)
# In a process of its own, for a match cannot be interrupted everywhere. The forms are those in which PEFT matches.
_PROGRAM = r"""
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for form in (r"{}", r"(.*\.)?({})$", r"(^|.*\.){}($|\..*)", r"(?:^|.*?\.){}\.(?P<idx>\d+)\."):
        try:
            match = re.compile(form.replace("{}", pattern)).fullmatch
        except Exception:
            continue
        for name in names:
            match(name)
"""


def check_patterns(config: Mapping[str, object], layers: Iterable[str]) -> None:
    """Raises ValueError where an expression in an adapter's configuration cannot be matched with the names of the
    layers in reasonable time; what is no expression, or none at all, is left to PEFT."""
    patterns = [each for name in FIELDS for each in _texts(config.get(name)) if not re.fullmatch(r"[\w.-]*", each)]
    if not patterns:
        return
    command = [sys.executable, "-I", "-S", "-c", _PROGRAM]
    try:
        subprocess.run(
            command, input=json.dumps([patterns, list(layers)]), text=True, timeout=LONGEST, stderr=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        shown = " or ".join(repr(pattern[:60]) for pattern in patterns)
        raise ValueError(
            f"the expression {shown} cannot be matched with the names of the layers within {LONGEST} seconds"
        ) from None


def _texts(value: object) -> list[str]:
    """Names, whichever way a field has them."""
    several = [value] if isinstance(value, str) else value if isinstance(value, list | dict) else ()
    return [each for each in several if isinstance(each, str)]
