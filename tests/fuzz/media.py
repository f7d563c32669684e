"""Videos and pictures whose bytes are changed."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz.running import RECIPE, ROOT, damaged


class Videos:
    """Files of several containers and codecs, their packets, boxes and tables changed."""

    def __init__(self, folder: Path) -> None:
        import av

        from revvideo.config import load_config
        from tests.revvideo.make_videos import encode

        av.logging.set_level(None)
        self.config = load_config(ROOT / "configs/video/demo/motion.yaml")
        kinds: dict[str, dict[str, Any]] = {
            "v.mp4": {"sound": True, "rotation": 90},
            "v.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
            "v.mkv": {"times": [0, 3, 4, 9, *range(10, 26)], "frames": 20},
            "v.webm": {"codec": "libvpx", "options": {"cpu-used": "8"}},
            "v.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
            "v.ts": {},
        }
        for name, how in kinds.items():
            encode(folder / name, **how)
        self.sources = [(folder / name).read_bytes() for name in kinds]
        self.endings = [Path(name).suffix for name in kinds]
        self.read(folder / "v.mp4")  # here, so that the children need not import what it takes

    def case(self, rnd: random.Random, path: Path) -> Callable[[], Any]:
        number = rnd.randrange(len(self.sources))
        raw, ending = self.sources[number], self.endings[number]
        match rnd.choice(["bytes", "bytes", "splice", "boxes", "ending"]):
            case "bytes":
                raw = damaged(raw, rnd)
            case "splice":
                other = rnd.choice(self.sources)
                raw = raw[: rnd.randrange(len(raw))] + other[rnd.randrange(len(other)) :]
            case "boxes":
                raw = self.boxes(raw, rnd)
            case "ending":
                ending = rnd.choice([*self.endings, ".mpg", ""])
        path = path.with_suffix(ending)
        path.write_bytes(raw)
        return lambda: self.read(path)

    def boxes(self, raw: bytes, rnd: random.Random) -> bytes:
        """Numbers in the tables of an mp4 file, and the sizes of these."""
        data = bytearray(raw)
        names = (
            b"stts stsz stco stsc ctts elst mdhd mvhd tkhd stss avcC stsd moov trak mdat".split()
        )
        found = [place for place in map(raw.find, names) if place > 0]
        numbers = [0, 1, 2**32 - 1, 2**31 - 1, 2**31, 10**9, 65536]
        for _ in range(rnd.choice([1, 2, 4]) if found else 0):
            at = rnd.choice(found) + rnd.choice([-4, *range(4, 44, 4)])
            data[at : at + 4] = rnd.choice(numbers).to_bytes(4, "big")
        return bytes(data)

    def read(self, path: Path) -> Any:
        from revdet.prediction.media import UnreadableError, VideoReader
        from revvideo.data.clips import ClipDataset, collate, test_clips, train_clips
        from revvideo.data.decode import probe
        from revvideo.data.manifest import VideoRecord
        from revvideo.data.transforms import TestTransform, TrainTransform

        data, augment, test = self.config.data, self.config.augment, self.config.test
        problems = []
        for clips, transform in (
            (test_clips(data, test), TestTransform(test, data)),
            (train_clips(data, augment), TrainTransform(augment, data)),
        ):
            record = VideoRecord(str(path), 0)
            dataset = ClipDataset([record], "", clips, transform, short_side=80)
            problems += collate([dataset[0, 0]])["problems"]
        with contextlib.suppress(UnreadableError), VideoReader(path) as reader:
            for number, _ in enumerate(reader):
                if number > 400:
                    break
        probe(path, deep=True)
        return problems[0][1] if problems else None


class Images:
    """Pictures of many formats, and headers that lie."""

    def __init__(self, folder: Path) -> None:
        import numpy as np
        from PIL import Image

        from revdet.config import load_config

        self.mapper = load_config(RECIPE).dataloader.test.mapper
        noise = np.random.default_rng(0).integers(0, 255, (12, 16, 3), np.uint8)
        image = Image.fromarray(noise).resize((160, 120))
        kinds = "PNG RGB,PNG RGBA,PNG P,PNG 1,PNG I;16,JPEG L,JPEG CMYK,JPEG RGB,WEBP RGB,TIFF RGB"
        self.sources = []
        for kind, mode in (text.split() for text in f"{kinds},BMP RGB,GIF P,PPM RGB".split(",")):
            file = io.BytesIO()
            image.convert("L" if mode == "I;16" else mode).convert(mode).save(file, kind)
            self.sources.append(file.getvalue())

    def case(self, rnd: random.Random, path: Path) -> Callable[[], Any]:
        raw = rnd.choice(self.sources)
        if raw[:4] == b"\x89PNG" and rnd.random() < 0.5:
            sizes = [(100000, 100000), (2**31 - 1, 1), (13000, 13000), (0, 5), (9400, 9400)]
            head = raw[12:16] + struct.pack(">II", *rnd.choice(sizes)) + raw[24:29]
            raw = raw[:12] + head + struct.pack(">I", zlib.crc32(head)) + raw[33:]
        else:
            raw = damaged(raw, rnd)
        path.write_bytes(raw)
        return lambda: self.read(path)

    def read(self, path: Path) -> Any:
        from backbones.common.images import ImageFiles, header_size
        from revdet.prediction.predictor import Preparation

        header_size(path)
        ImageFiles([str(path)], 64, 64)[0]
        return Preparation(self.mapper).read((0, path))
