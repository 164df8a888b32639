"""A mistake of the person at the keyboard, or a start that cannot succeed: one line, no traceback."""

from __future__ import annotations


class CommandError(Exception):
    """The message is one line that says what was expected and what was found.

    `exit_code` is 2 for a mistake in the command or its environment, 1 for what failed while running.
    """

    def __init__(self, message: str, *, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code
