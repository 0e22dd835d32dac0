"""Errors that a user can cause: one line that says what is wrong and what to do."""

import argparse
import re
import unicodedata

HIDDEN = "(hidden)"
# Access tokens by their makers' prefixes, which models and folders have as well, but with shorter or lower-case names
# behind them; JSON web tokens; what stands before the @ of an address, which as a path has a single slash; and what
# follows on a flag for a secret.
_SECRETS = re.compile(
    r"\b((hf|api_org|gh[pousr])_[A-Za-z0-9]{16,}|github_pat_\w{20,}"
    r"|(sk|glpat)-(?=[\w-]{0,99}\d)(?=[\w-]{0,99}[A-Z])[\w-]{16,}"
    r"|xox[abprs]-[\w-]{10,}|AKIA[A-Z0-9]{16}|ms-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})"
    r"|\beyJ[\w-]{9,999}\.[\w-]+\.[\w-]+|(?:(?<=://)|(?<=\w:/)(?!/))[^/\s]+(?=@)|(?<=Bearer )\S+"
)
_SECRET_FLAGS = re.compile(
    r"(--?[\w-]{0,40}(?:token|secret|passwo?r?d|credentials?|api[-_]?key)[ =]+)[^\s;]+", re.IGNORECASE
)


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
    return printable(without_secrets(re.sub(r"\s*\n\s*", " ", text)))


def without_secrets(text: str) -> str:
    """`text`, with what looks like an access token or a password taken out."""
    return _SECRET_FLAGS.sub(rf"\1{HIDDEN}", _SECRETS.sub(HIDDEN, text))


def printable(text: str) -> str:
    """`text` without what a terminal would take for a command, which stands in it as Python writes it: \\x1b."""
    shown = (each.isprintable() or unicodedata.category(each) == "Zs" for each in text)  # spaces are of many kinds
    return "".join(each if kept else repr(each)[1:-1] for each, kept in zip(text, shown, strict=True))
