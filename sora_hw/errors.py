"""Errors that a user can cause: one line that says what is wrong and what to do."""

import argparse


class UserError(Exception):
    """Something the user can put right. Programs print its one line and exit with code 2, without a traceback."""


class DataError(UserError):
    """A training or test file that is missing, malformed or empty; the message names file and line."""


class Parser(argparse.ArgumentParser):
    """A command line's flags, whose errors are raised as UserError."""

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")
