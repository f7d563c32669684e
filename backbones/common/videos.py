"""Video files by PyAV, which is imported late."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any


def open_container(path: str) -> Any:
    """A file as ``av.open`` gives it, whatever its metadata."""
    import av

    # PyAV 18 fails on metadata that are no UTF-8 unless told not to; 19 takes no word.
    old = int(av.__version__.partition(".")[0]) < 19
    options: dict[str, Any] = {"metadata_errors": "ignore"} if old else {}
    return av.open(path, **options)


@contextmanager
def h264_writer(
    path: Path,
    unit: Fraction,
    options: dict[str, str],
    *,
    rate: float | None = None,
    threads: int = 0,
    comment: str = "",
) -> Iterator[Callable[[Any, int], None]]:
    """A function that appends frames to an mp4 file without sound.

    It takes a frame (H, W, 3), uint8 RGB, and its time in ``unit`` seconds, later than the last
    one's. Of an odd size the last row or column is lost, because H.264 halves the resolution of its
    colours. The ``options`` are those of x264.
    """
    import av
    from numpy import ascontiguousarray

    with av.open(str(path), "w", format="mp4") as container:
        if comment:
            container.metadata["comment"] = comment
        per_second = Fraction(rate).limit_denominator(1001) if rate else None
        stream = container.add_stream("libx264", per_second, options)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = unit
        stream.codec_context.thread_count = threads

        def write(pixels: Any, time: int) -> None:
            if not stream.codec_context.is_open:
                stream.height, stream.width = (max(2, side // 2 * 2) for side in pixels.shape[:2])
            pixels = ascontiguousarray(pixels[: stream.height, : stream.width])
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts, frame.time_base = time, unit
            container.mux(stream.encode(frame))

        yield write
        container.mux(stream.encode(None))
