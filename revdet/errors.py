"""The one kind of error that is the user's to fix."""


class UserError(ValueError):
    """Something the user gave is wrong. The message is one line: the thing, then the remedy.

    The commands print it without a traceback and exit with status 2.
    """
