"""Broken input of several kinds, through the project's own functions; from the project's root:

    python -m tests.fuzz videos|images|coco|configs|checkpoints [--count N] [--seed N]

Each case changes a good file at random, the same ones for the same seed, and runs in a forked child
with a watchdog and a limit on its memory. It may be taken, or refused by an error of the project.
Each new kind of failure is printed once; exits with 1 after a traceback, a crash, a hang, code that
the file brought along, or more memory than the limit.

A kind is a class with ``case(random, path) -> function``: it writes a case to ``path`` and returns
what to do with it, which returns nothing or a refusal. Add it to ``KINDS``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import json
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECIPE = str(ROOT / "configs/detection/demo/mask_rcnn_rev_vit_demo.py")
SECONDS, MEGABYTES = 30, 900  # of a case; memory above what the process has before
TINY = [
    "model.backbone.net.model.embed_dim=24",
    "model.backbone.net.model.depth=1",
    "model.backbone.net.model.img_size=64",
    "model.backbone.square_pad=64",
    "dataloader.train.num_workers=0",
    "train.device=cpu",
    "train.pictures=1",
]
OK = ("ok", "refused")


def outcome_of(work: Callable[[], Any]) -> tuple[str, str]:
    """How a case ends in this process; a text that it returns is a refusal."""
    try:
        said = work()
        return ("refused", said) if isinstance(said, str) else ("ok", "")
    except SystemExit as error:
        return "refused", f"exit {error.code}"
    except MemoryError:
        return "memory", "MemoryError"
    except BaseException as error:
        owners = {kind.__module__.split(".")[0] for kind in type(error).__mro__}
        if owners & {"backbones", "revdet", "revvideo"}:
            return ("refused" if "\n" not in str(error).strip() else "many lines"), str(error)
        if isinstance(error, ValueError | OSError) and _by_library(error):
            return "refused", str(error)
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if f.filename.startswith(str(ROOT)) and ".venv" not in f.filename]
        where = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "?"
        return "traceback", f"{type(error).__name__} at {where}: {str(error)[:150]}"


def _by_library(error: BaseException) -> bool:
    """Raised by backbones itself, whose public functions refuse with a plain ValueError."""
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(f"{ROOT}/backbones")


def in_child(work: Callable[[], Any]) -> tuple[str, str]:
    """:func:`outcome_of` in a forked child, or what ended that."""
    read, write = os.pipe()
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    if not (child := os.fork()):
        os.close(read)
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + (6 << 30),) * 2)
        kind, text = outcome_of(work)
        os.write(write, json.dumps([kind, text[:2000]]).encode())
        os._exit(0)
    os.close(write)
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - begun > SECONDS:
            with contextlib.suppress(OSError):
                os.killpg(child, signal.SIGKILL)
            os.wait4(child, 0)
            os.close(read)
            return "hang", f"not done after {SECONDS} s"
        time.sleep(0.01)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    if not data:
        return "crash", f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "no word"
    if (more := (usage.ru_maxrss - before) // 1024) > MEGABYTES:
        return "memory", f"{more} MB more"
    kind, text = json.loads(data)
    return kind, text


def damaged(raw: bytes, rnd: random.Random) -> bytes:
    """A file with a part flipped, cut off, zeroed or doubled."""
    data, length = bytearray(raw), len(raw)
    match rnd.choice(["flip", "head", "cut", "zero", "twice"]):
        case "flip" | "head" as where:
            for _ in range(rnd.choice([1, 10, 100])):
                data[rnd.randrange(min(length, 200) if where == "head" else length)] ^= (
                    1 << rnd.randrange(8)
                )
        case "cut":
            del data[rnd.randrange(length) :]
        case "zero":
            at, size = rnd.randrange(length), rnd.choice([50, 1000, length // 3])
            data[at : at + size] = bytes(len(data[at : at + size]))
        case "twice":
            at = rnd.randrange(length)
            data[at:at] = data[at : at + 500]
    return bytes(data)


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
        from revdet.prediction.predictor import PictureFiles, Preparation

        header_size(path)
        ImageFiles([str(path)], 64, 64)[0]
        return PictureFiles([path], Preparation(self.mapper))[0]


BIG: list[Any] = [10**400, -(10**400), 2**63, -(2**63), 2**31, 1e308, 1e-320, -1, 0, 0.5, True]
BIG += [float("nan"), float("inf")]
ODD: list[Any] = [None, "", "\0", "../" * 9, "/dev/zero", "\ud800", "é" * 300, "x" * 5000, [], {}]
ODD += [[[]], [None], {"a": 1}, "1"]


class Coco:
    """Annotation files: read, normalised, trained on for a step an image, and evaluated."""

    def __init__(self, folder: Path) -> None:
        import numpy as np
        from PIL import Image
        from pycocotools import mask

        self.images, images, annotations = folder / "img", [], []
        self.images.mkdir()
        drawn = np.zeros((48, 64), np.uint8, order="F")
        drawn[12:36, 16:48] = 1
        packed = mask.encode(drawn)["counts"].decode()
        forms = [
            [[16, 12, 48, 12, 48, 36, 16, 36]],
            {"size": [48, 64], "counts": packed},
            {"size": [48, 64], "counts": [16 * 48 + 12, *[24, 24] * 31, 24, 16 * 48 + 12]},
        ]
        for number in (1, 2, 3):
            pixels = np.random.default_rng(number).integers(0, 255, (48, 64, 3), np.uint8)
            Image.fromarray(pixels).save(self.images / f"{number}.png")
            size = {"width": 64, "height": 48}
            images.append({"id": number, "file_name": f"{number}.png", **size})
            entry = {"id": number, "image_id": number, "category_id": 1, "iscrowd": 0, "area": 768}
            box = {"bbox": [16, 12, 32, 24], "segmentation": forms[number - 1]}
            annotations.append({**entry, **box})
        categories = [{"id": 1, "name": "box"}]
        self.base = {"images": images, "annotations": annotations, "categories": categories}

    def case(self, rnd: random.Random, path: Path) -> Callable[[], Any]:
        tree = copy.deepcopy(self.base)
        for _ in range(rnd.choice([1, 1, 2, 5])):
            change(tree, rnd)
        raw = json.dumps(tree).encode()
        if rnd.random() < 0.2:
            deep = rnd.choice([900, 5000])
            nested = raw[:-1] + b', "deep": ' + b"[" * deep + b"]" * deep + b"}"
            raw = rnd.choice([nested, b"\xef\xbb\xbf" + raw, damaged(raw, rnd)])
        path.write_bytes(raw)
        skip = f"dataset.skip_broken={str(rnd.random() < 0.7).lower()}"
        return lambda: self.train(path, skip)

    def train(self, path: Path, skip: str) -> None:
        from detectron2.config import instantiate
        from detectron2.utils.events import EventStorage

        from revdet.config import load_config
        from revdet.data.normalise import normalise, use_normalised
        from revdet.models import build_model
        from revdet.training.evaluation import evaluate
        from revdet.training.results import finish

        data = [f"dataset.{split}_json={path}" for split in ("train", "val")]
        data += [f"dataset.{split}_images={self.images}" for split in ("train", "val")]
        out = f"train.output_dir={path}.out"
        cfg = load_config(RECIPE, [*TINY, *data, skip, out])
        normalise(cfg)
        use_normalised(cfg)
        model, loader = build_model(cfg, "cpu"), instantiate(cfg.dataloader.train)
        mapper = instantiate(cfg.dataloader.train.mapper)
        with EventStorage():
            for record in loader.dataset.records:
                sum(model([mapper(copy.deepcopy(record))]).values()).backward()
        finish(cfg, model, evaluate(cfg, model.eval()), {}, trained=False)


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a tree."""
    if not isinstance(tree, dict | list):
        return
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*path, key)
        yield from places(value, (*path, key))


def change(tree: Any, rnd: random.Random) -> None:
    """Change one thing somewhere in a tree."""
    if not (paths := [path for path in places(tree) if len(path) < 5 or rnd.random() < 0.2]):
        return
    *above, key = rnd.choice(paths)
    parent = tree
    for step in above:
        parent = parent[step]
    match rnd.choice(["drop", "big", "odd", "twice", "list", "text", "counts"]):
        case "drop":
            del parent[key]
        case "twice" if isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        case "list":
            parent[key] = [parent[key]]
        case "text":
            parent[key] = "7"
        case "counts":
            texts = ["o" * 24, "", "PPP" * 50, "~" * 1000, {"a": 1}, [2**32, 5], [10**30], [None]]
            random_text = "".join(chr(rnd.randint(48, 111)) for _ in range(rnd.randint(1, 40)))
            counts = rnd.choice([*texts, [1.5], [-5, 10], random_text, random_text])
            parent[key] = {"size": [48, 64], "counts": counts}
        case other:
            parent[key] = copy.deepcopy(rnd.choice(BIG if other == "big" else ODD))


VALUES = [
    "-1",
    "0",
    "1e308",
    "nan",
    "inf",
    "''",
    "null",
    "[]",
    "{}",
    "true",
    "999999999999999999999",
    "abc",
    "[1,2]",
    "{a:1}",
    "${train.seed}",
    "${nope}",
    "${oc.env:HOME}",
    "${oc.decode:1}",
    "1e-30",
    "0.5",
    "a,b",
    "'",
    '"',
    "[",
    "{",
    "é",
    "\x00",
    "/dev/null",
    "..",
    "1e400",
    "==",
]
KEYS = [
    "train.init_checkpoint",
    "train.max_iter",
    "train.seed",
    "train.device",
    "train.memory",
    "train.accumulate",
    "train.memory_budget",
    "train.stored_blocks",
    "train.clip_grad_norm",
    "train.ema_decay",
    "train.eval_period",
    "train.amp.dtype",
    "train.checkpointer.period",
    "train.output_dir",
    "optimizer.lr",
    "dataset.train_json",
    "optimizer.weight_decay",
    "model.backbone.net.model.depth",
    "model.backbone.net.model.name",
    "train",
    "..",
    "x",
    "dataset.skip_broken",
    "dataloader.train.total_batch_size",
    "lr_multiplier.warmup_length",
    "nope.x",
]


class Configs:
    """Overrides, and the config.yaml of a run, with code in it at times."""

    def __init__(self, folder: Path) -> None:
        from detectron2.config import LazyConfig

        from revdet.config import load_config

        self.mark, saved = folder / "executed", folder / "saved.yaml"
        LazyConfig.save(load_config(RECIPE, TINY), str(saved))
        self.saved = saved.read_bytes()

    def case(self, rnd: random.Random, path: Path) -> Callable[[], Any]:
        if rnd.random() < 0.5:
            given = [f"{rnd.choice(KEYS)}={rnd.choice(VALUES)}" for _ in range(rnd.choice([1, 2]))]
            return lambda: self.load(RECIPE, [*TINY, *given])
        path = path.with_suffix(".yaml")
        lines = self.saved.split(b"\n")
        at = rnd.randrange(len(lines))
        evil = f"zz: !!python/object/apply:os.mkdir ['{self.mark}']"
        target = f"zz: {{_target_: os.mkdir, path: '{self.mark}'}}"
        more = [evil, target, "zz: " + "[" * 2000, "zz: ${oc.env:HOME}", "train: 5", "- a", "\t"]
        lines.insert(rnd.choice([at, len(lines)]), rnd.choice(more).encode())
        path.write_bytes(rnd.choice([b"\n".join(lines), damaged(self.saved, rnd)]))
        return lambda: self.load(str(path), TINY)

    def load(self, path: str, overrides: list[str]) -> None:
        from revdet.config import load_config

        load_config(path, overrides)


class Evil:
    """What makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def layouts() -> dict[str, dict[str, Any]]:
    """A ViT of one block by the names of timm, DINOv2, ViTDet, Hugging Face and torchvision."""
    import torch

    width = 24
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj": (width, 3, 16, 16), "norm": (width,)}
    shapes |= {"blocks.0.norm1": (width,), "blocks.0.norm2": (width,), "head": (3, width)}
    shapes |= {"blocks.0.attn.qkv": (3 * width, width), "blocks.0.attn.proj": (width, width)}
    shapes |= {"blocks.0.mlp.fc1": (4 * width, width), "blocks.0.mlp.fc2": (width, 4 * width)}
    timm = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    timm |= {f"{name}.bias": torch.randn(shape[0]) for name, shape in shapes.items()}
    timm |= {"cls_token": torch.randn(1, 1, width), "pos_embed": torch.randn(1, 5, width)}
    dino = timm | {f"blocks.0.ls{n}.gamma": torch.randn(width) for n in (1, 2)}
    dino |= {"register_tokens": torch.randn(1, 4, width), "mask_token": torch.randn(1, width)}
    tables = {f"blocks.0.attn.rel_pos_{axis}": torch.randn(3, 8) for axis in "hw"}
    body = {k: v for k, v in timm.items() if not k.startswith(("norm.", "head.", "cls_"))}
    vitdet = {f"backbone.net.{name}": value for name, value in (body | tables).items()}
    vitdet["backbone.simfp_2.0.weight"] = vitdet["roi_heads.x.bias"] = torch.randn(width)
    renames = {
        "Hugging Face": "blocks.=encoder.layer. norm1=layernorm_before norm2=layernorm_after "
        "attn.proj=attention.output.dense mlp.fc1=intermediate.dense mlp.fc2=output.dense "
        "pos_embed=embeddings.position_embeddings cls_token=embeddings.cls_token head=classifier "
        "patch_embed.proj=embeddings.patch_embeddings.projection",
        "torchvision": "blocks.=encoder.layers.encoder_layer_ norm1=ln_1 norm2=ln_2 mlp.fc1=mlp.0 "
        "mlp.fc2=mlp.3 attn.qkv.=self_attention.in_proj_ attn.proj=self_attention.out_proj "
        "patch_embed.proj=conv_proj pos_embed=encoder.pos_embedding cls_token=class_token",
    }
    found = {"timm": timm, "DINOv2": dino, "ViTDet": vitdet}
    for layout, pairs in renames.items():
        found[layout] = {}
        for name, value in timm.items():
            for ours, theirs in (pair.split("=") for pair in pairs.split()):
                name = name.replace(ours, theirs)
            if layout == "Hugging Face" and ".attn.qkv." in name:
                for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    found[layout][name.replace("attn.qkv", f"attention.attention.{part}")] = rows
            else:
                found[layout][name] = value
    return found


class Checkpoints:
    """Weights of a trunk, own and foreign: damaged, of other names, types and shapes, with code."""

    def __init__(self, folder: Path) -> None:
        import torch

        import backbones

        self.mark, self.folder = folder / "executed", folder
        sizes = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_classes": 3}
        positions = {"use_rel_pos": True, "final_norm": False}
        kinds: dict[str, dict[str, Any]] = {"rev_vit_tiny": {"fuse": "mean"}}
        kinds["vit_tiny"] = {"class_token": True, "num_registers": 4}
        self.models = [
            functools.partial(backbones.create_model, name, **sizes, **more)
            for name, more in [("rev_vit_tiny", {}), *kinds.items(), ("vit_tiny", positions)]
        ]
        own = self.models[0]()
        torch.save(own.state_dict(), folder / "good.pth")
        backbones.save_weights(own, folder / "good.safetensors")
        self.sources = [own.state_dict(), *layouts().values()]

    def case(self, rnd: random.Random, path: Path) -> Callable[[], Any]:
        import torch

        make = rnd.choice(self.models)
        if rnd.random() < 0.2:
            file = self.folder / rnd.choice(["good.pth", "good.safetensors"])
            path.write_bytes(damaged(file.read_bytes(), rnd))
            return lambda: self.load(make, path)
        content: dict[Any, Any] = dict(rnd.choice(self.sources))
        evil = Evil(self.mark)
        for _ in range(rnd.choice([0, 1, 1, 3])):
            self.change(content, rnd, evil)
        nests = [content, {"model": content, "epoch": 3}, {"state_dict": {"model": content}}]
        nests += [{"teacher": content, "student": content}, {"model": {}, "model_ema": content}]
        nests += [{"model": content, "args": evil}, [content], 5, evil, {}, {"model": [content]}]
        nested: Any = rnd.choice([*nests[:5], *nests])
        if rnd.random() < 0.5:
            torch.save(nested, path)
        else:
            path.write_bytes(pickle.dumps(arrays_in(nested, rnd), protocol=rnd.choice([2, 4, 5])))
        if rnd.random() < 0.2:
            path.write_bytes(damaged(path.read_bytes(), rnd))
        return lambda: self.load(make, path)

    def change(self, content: dict[Any, Any], rnd: random.Random, evil: Evil) -> None:
        import torch

        key = rnd.choice([*content])
        value = content[key]
        match rnd.choice(["value", "value", "drop", "twice", "prefix", "other"]):
            case "drop":
                del content[key]
            case "twice":
                content[f"module.{key}"] = value
            case "prefix":
                start = rnd.choice(["module.", "backbone.net.", "teacher.", "encoder.", "\0", "."])
                renamed = {f"{start}{name}": tensor for name, tensor in content.items()}
                content.clear()
                content.update(renamed)
            case how if isinstance(value, torch.Tensor):
                odd: list[Any] = [
                    evil,
                    torch.zeros(0),
                    None,
                    "x",
                    torch.zeros(1),
                    10**400,
                    value[:1],
                ]
                odd += [torch.zeros(1).expand(10**6, 10**6), torch.zeros(2, 0, 3), value[None]]
                odd += [value.to(t) for t in (torch.int32, torch.float64, torch.complex64)]
                odd += [value.float().reshape(1, -1).to_sparse(), value * float("nan")]
                odd += [torch.cat([value, value]), value.half(), torch.quantize_per_tensor]
                content[key if how == "value" else rnd.choice(["other", 5])] = rnd.choice(odd)

    def load(self, make: Callable[[], Any], path: Path) -> None:
        import torch

        import backbones

        model = make()
        before = copy.deepcopy(model.state_dict())
        try:
            backbones.load_weights(model, path)
        except Exception:
            after = model.state_dict()
            assert all(torch.equal(before[key], after[key]) for key in before), "half loaded"
            raise


def arrays_in(tree: Any, rnd: random.Random) -> Any:
    """A tree with NumPy's arrays in place of tensors, as files of Detectron2's zoo have them."""
    import numpy as np
    import torch

    if isinstance(tree, dict):
        return {key: arrays_in(value, rnd) for key, value in tree.items()}
    if isinstance(tree, list):
        return [arrays_in(value, rnd) for value in tree]
    if not isinstance(tree, torch.Tensor) or tree.layout != torch.strided or tree.numel() > 10**6:
        return tree
    array = tree.numpy()
    if rnd.random() < 0.003:
        odd = [array.astype(object), array.astype("U9"), array.astype(">f4"), np.float32(3)]
        odd += [np.asfortranarray(array), np.ma.array(array), array.view(np.recarray)]
        return rnd.choice([*odd, np.zeros(3, "f4,i4"), np.datetime64("2020"), np.dtype("f4")])
    return array


KINDS = {
    "videos": Videos,
    "images": Images,
    "coco": Coco,
    "configs": Configs,
    "checkpoints": Checkpoints,
}


def fuzz(name: str, count: int, seed: int) -> dict[str, str]:
    """Run ``count`` cases of a kind; the failures, the first case of each."""
    import torch
    from PIL import Image

    import revdet.config  # noqa: F401  here, so that the children need not import it

    Image.init()
    torch.set_num_threads(1)
    failures: dict[str, str] = {}
    counts: Counter[str] = Counter()
    folder = Path(tempfile.mkdtemp(prefix="fuzz_"))
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.chdir(folder):
            warnings.simplefilter("ignore")
            kind: Any = KINDS[name](folder)
            mark = getattr(kind, "mark", folder / "executed")
            for number in range(count):
                work = kind.case(random.Random(f"{seed} {number}"), folder / str(number))
                outcome, text = in_child(work)
                if mark.exists():
                    outcome, text = "code", "what the file brought along was executed"
                    mark.rmdir()
                counts[outcome] += 1
                if outcome not in OK:
                    failures.setdefault(
                        f"{outcome} {text.split(': ')[0]}", f"case {number}: {text}"
                    )
    finally:
        logging.disable(logging.NOTSET)
        shutil.rmtree(folder, ignore_errors=True)
    figures = ", ".join(f"{outcome} {number}" for outcome, number in sorted(counts.items()))
    print(f"{name}: {count} cases of seed {seed}: {figures}")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    failures = fuzz(args.kind, args.count, args.seed)
    for kind, first in failures.items():
        print(f"{kind}, {first}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
