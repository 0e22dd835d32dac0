"""Errors that a user can cause: one line that says what is wrong and what to do."""

import argparse
import re
import unicodedata


class UserError(Exception):
    """Something the user can put right. Programs print its one line and exit with `code`, without a traceback."""

    code = 2


class DataError(UserError):
    """A training or test file that is missing, malformed or empty; the message names file and line."""


class Parser(argparse.ArgumentParser):
    """A command line's flags, whose errors are raised as UserError."""

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")

    def _get_values(self, action: argparse.Action, given: list[str]):
        if given == ["--"] and action.option_strings and action.nargs not in (argparse.PARSER, argparse.REMAINDER):
            raise argparse.ArgumentError(action, "expected a value")  # Python 3.11 makes an empty list of `--flag=--`
        return super()._get_values(action, given)


def one_line(error: UserError | OSError) -> str:
    """What a program prints of it: one line, without what a terminal would take for a command or an address' password.

    Raises the error itself where it is the system's and names no file: then it is no mistake of the user's.
    """
    if isinstance(error, OSError):
        if error.filename is None:
            raise error
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error)
    line = re.sub(r"(?<=://)[^/\s@]+@", "(hidden)@", re.sub(r"\s*\n\s*", " ", text))
    return printable(line)


def printable(text: str) -> str:
    """`text` without what a terminal would take for a command, which stands in it as Python writes it: \\x1b."""
    shown = (each.isprintable() or unicodedata.category(each) == "Zs" for each in text)  # spaces are of many kinds
    return "".join(each if kept else repr(each)[1:-1] for each, kept in zip(text, shown, strict=True))
