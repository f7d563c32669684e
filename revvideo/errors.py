"""What can be wrong with a video file."""


class VideoError(Exception):
    """A video file cannot be used; ``reason`` is one line, without the name of the file.

    Datasets skip such a file, count it and name it.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
