"""What can be wrong with a video file."""


class VideoError(Exception):
    """A video file cannot be used. Datasets skip such a file, count it and name it.

    Attributes:
        reason: one line, without the name of the file.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
