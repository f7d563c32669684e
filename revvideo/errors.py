"""What can be wrong with a video file."""


class VideoError(Exception):
    """A video file cannot be used; the message is one line, without the name of the file."""
