"""The errors that a person can do something about."""


class UserError(ValueError):
    """Something the user gave is wrong. The message is one line: the thing, then the remedy.

    The commands print it without a traceback and exit with status 2.
    """


class VideoError(Exception):
    """A video file cannot be used. Datasets skip such a file, count it and name it.

    Attributes:
        reason: one line, without the name of the file.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class NotMediaError(VideoError):
    """The file holds neither moving pictures nor sound: a text or an image."""
