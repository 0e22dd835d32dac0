"""JSON that somebody else may have written: whatever is wrong with the file is an OSError or a ValueError."""

import json
import os
import stat
from pathlib import Path


def read_json(file: Path) -> object:
    """What the file holds, in JSON's types.

    Raises OSError where it cannot be read or is no regular file (a pipe would be waited for, a device may never end),
    ValueError where it is not UTF-8, not JSON, or nested deeper than Python goes.
    """
    check_regular(file)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{file} is nested too deeply") from None


def check_regular(file: Path) -> None:
    """Raises OSError, before it is opened, for what is no regular file or a link to one."""
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise OSError(0, "not a regular file", str(file))
