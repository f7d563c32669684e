"""The one kind of error that is the user's to fix, and the gist of all others."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave is wrong. The message is one line: the thing, then the remedy.

    The commands print it without a traceback and exit with status 2.
    """


def error_line(error: BaseException) -> str:
    """The reason in one line, without the path, which every message about a file names already."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return reason.splitlines()[0]
