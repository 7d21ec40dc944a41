"""The one exception for mistakes a user can mend, and how a command ends on it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """A mistake outside the program: a key, a file, a machine.

    The message names the key or file, the value found, and what would be right. Commands print it
    without a traceback and end with exit code 2.
    """


class ConfigError(UserError):
    """All problems of one configuration, reported together."""

    def __init__(self, problems: list[str]) -> None:
        """`problems`: one line or short paragraph each; must not be empty."""
        assert problems
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{count} in the configuration:\n" + "\n".join(f"  - {p}" for p in problems))


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """End the process with code 2 and one message on a `UserError`, 130 on Ctrl-C."""
    try:
        yield
    except UserError as error:
        print(f"nexa: error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("nexa: interrupted", file=sys.stderr, flush=True)
        sys.exit(EXIT_INTERRUPTED)
