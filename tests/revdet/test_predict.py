"""Pictures and videos in, drawings and COCO-format JSON out."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from backbones.common.videos import h264_writer
from revdet.config import load_config
from revdet.data.classes import categories_of
from revdet.predict import main
from revdet.prediction.media import VideoReader
from revdet.prediction.predictor import Detector, Frame, Preparation, batches
from tests.revdet.conftest import DEMO, FEW, SMALL, error_of

THRESHOLD = 0.01  # an untrained model calls everything background


@pytest.fixture(scope="module")
def run(datasets_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run, whose model finds something everywhere."""
    from revdet.train_net import main as train

    torch.manual_seed(0)
    output = tmp_path_factory.mktemp("run")
    short = ["train.max_iter=2", f"train.output_dir={output}"]
    assert train(["--config", DEMO, *SMALL, *FEW, *short]) == 0
    return output


@pytest.fixture
def predict(run: Path, tmp_path: Path) -> Callable[..., int]:
    """``predict(*arguments)``: the command on that run's model, to ``tmp_path / "out"``."""

    def call(*arguments: Any, output: Path = tmp_path / "out", config: Any = None) -> int:
        files = ["--config", config or run / "config.yaml", "--weights", run / "model_final.pth"]
        options = ["--output", output, "--threshold", THRESHOLD, "--workers", 0, "--device", "cpu"]
        return main([str(word) for word in [*files, *options, *arguments]])

    return call


def read(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return tuple(json.loads((folder / f"{n}.json").read_text()) for n in ("predictions", "results"))


@pytest.fixture
def photos(datasets_root: Path, tmp_path: Path) -> Path:
    """A folder with four pictures, one of them in a folder below, and something else."""
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for number in range(3):
        shutil.copy(datasets_root / "demo" / "val" / f"00000{number}.jpg", folder)
    shutil.copy(folder / "000000.jpg", folder / "below")
    (folder / "notes.txt").write_text("not a picture")
    return folder


def test_predictions_and_drawings_are_those_of_evaluation(
    predict, photos, run, datasets_root, tmp_path
):
    assert predict("--input", photos) == 0
    objects, results = read(tmp_path / "out")

    cfg = load_config(str(run / "config.yaml"), ["dataloader.test.num_workers=0"])
    model = instantiate(cfg.model).eval()
    model.load_state_dict(torch.load(run / "model_final.pth", weights_only=True)["model"])
    expected = {}
    with torch.no_grad():
        for batch in instantiate(cfg.dataloader.test):
            found = model(batch)[0]["instances"]
            expected[Path(batch[0]["file_name"]).name] = found[found.scores >= THRESHOLD]

    names = [Path(picture["file_name"]).name for picture in results["pictures"]]
    assert names == [f"00000{number}.jpg" for number in (0, 1, 2, 0)]
    ids = [category["id"] for category in results["categories"]]
    assert ids == [1, 3, 7, 11, 12]
    for picture in results["pictures"]:
        found = expected[Path(picture["file_name"]).name]
        theirs = instances_to_coco_json(found, picture["image_id"])
        ours = [o for o in objects if o["image_id"] == picture["image_id"]]
        assert len(ours) == len(theirs) == picture["objects"] > 0
        for our, their in zip(ours, theirs, strict=True):
            assert our["bbox"] == pytest.approx(their["bbox"], abs=1e-3)
            assert our["score"] == pytest.approx(their["score"], abs=1e-5)
            assert our["category_id"] == ids[their["category_id"]]
            assert our["file_name"] == picture["file_name"]
            overlap = rle.iou([our["segmentation"]], [their["segmentation"]], [0])
            assert overlap > 0.99 or rle.area(their["segmentation"]) == 0

    drawings = [Path(picture["drawing"]) for picture in results["pictures"]]
    assert len(set(drawings)) == 4  # also of the two that have one name
    for drawing, picture in zip(drawings, results["pictures"], strict=True):
        drawn = np.asarray(Image.open(drawing), int)
        assert drawn.shape == (picture["height"], picture["width"], 3)
        assert np.abs(drawn - np.asarray(Image.open(picture["file_name"]), int)).max() > 50

    truth = COCO()  # what is written is what pycocotools takes
    images = [{"id": p["image_id"], **p} for p in results["pictures"]]
    truth.dataset = {"images": images, "categories": results["categories"], "annotations": []}
    truth.createIndex()
    loaded = truth.loadRes(str(tmp_path / "out" / "predictions.json"))
    assert len(loaded.anns) == len(objects)
    assert loaded.annToMask(loaded.anns[1]).shape == (images[0]["height"], images[0]["width"])


def test_the_batch_changes_nothing(predict, photos, tmp_path):
    assert predict("--input", photos, "--no-drawings") == 0
    assert not (tmp_path / "out" / "pictures").exists()
    assert predict("--input", photos, "--batch-size", 3, output=tmp_path / "three") == 0
    (one, _), (three, results) = read(tmp_path / "out"), read(tmp_path / "three")
    assert results["run"]["batch_size"] == 3
    assert len(one) == len(three)
    for single, batched in zip(one, three, strict=True):
        assert batched["bbox"] == pytest.approx(single["bbox"], abs=1e-2)
        assert batched["score"] == pytest.approx(single["score"], abs=1e-4)


def test_a_batch_is_of_one_size():
    sizes = [(4, 6), (4, 6), (6, 4), (4, 6), (4, 6), (4, 6), (4, 6)]
    inputs = [{"image": torch.zeros(3, *size)} for size in sizes]
    frames = [Frame(index, np.zeros(0), given) for index, given in enumerate(inputs)]
    indices = [[frame.index for frame in batch] for batch in batches(frames, 3)]
    assert indices == [[0, 1], [2], [3, 4, 5], [6]]


def test_the_threshold(predict, photos, tmp_path):
    file = photos / "000000.jpg"
    assert predict("--input", file) == 0
    low = sorted(found["score"] for found in read(tmp_path / "out")[0])
    middle = low[len(low) // 2]
    assert predict("--input", file, "--threshold", middle) == 0
    high = sorted(found["score"] for found in read(tmp_path / "out")[0])
    assert 0 < len(high) < len(low)
    assert high == pytest.approx([score for score in low if score >= middle], abs=1e-5)


def test_files_folders_and_patterns_each_once(predict, photos, tmp_path):
    inputs = [photos / "000001.jpg", photos / "*.jpg", photos / "below"]
    assert predict("--input", *inputs, "--no-drawings") == 0
    _, results = read(tmp_path / "out")
    names = [str(Path(p["file_name"]).relative_to(photos)) for p in results["pictures"]]
    assert names == ["000001.jpg", "000000.jpg", "000002.jpg", "below/000000.jpg"]


BAD = ("empty.jpg", "cut.jpg", "fake.mp4", "line.png", "line.mp4")


def test_what_cannot_be_read_is_counted_and_named(predict, photos, tmp_path, capsys):
    (photos / "empty.jpg").touch()
    whole = (photos / "000001.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "fake.mp4").write_bytes(b"no video")
    Image.new("RGB", (3000, 1)).save(photos / "line.png")  # nothing is left of it at its new size
    with h264_writer(photos / "line.mp4", Fraction(1, 10), {}) as write:
        write(np.zeros((4, 1200, 3), np.uint8), 0)
    assert predict("--input", photos, "--no-drawings") == 0
    _, results = read(tmp_path / "out")
    unreadable = {str(photos / name) for name in BAD}
    assert results["unreadable"].keys() == unreadable
    assert len(results["pictures"]) == 4
    printed = capsys.readouterr().err
    assert "5 unreadable" in printed and all(path in printed for path in unreadable)
    assert predict("--input", photos / "empty.jpg") == 2
    assert "none of the 1 inputs" in error_of(capsys)


def write_video(path: Path, frames: int, size: tuple[int, int], picture: Path) -> None:
    pixels = np.asarray(Image.open(picture).resize(size))
    with h264_writer(path, Fraction(1, 25), {}) as write:
        for number in range(frames):
            write(np.roll(pixels, 8 * number, axis=1), 2 * number)


def test_a_video(predict, photos, tmp_path, monkeypatch):
    detect = Detector.detect

    def with_whole_masks(self: Detector, frames: list[Frame]) -> list[Instances]:
        found = detect(self, frames)
        for instances in found:  # an untrained model's are empty, and videos get no boxes drawn
            instances.pred_masks = torch.ones_like(instances.pred_masks)
        return found

    monkeypatch.setattr(Detector, "detect", with_whole_masks)
    clip = tmp_path / "clip.mp4"
    write_video(clip, 5, (150, 121), photos / "000000.jpg")  # 120 high: H.264 wants even sides
    assert predict("--input", photos / "000000.jpg", clip, "--batch-size", 2) == 0
    objects, results = read(tmp_path / "out")
    (video,) = results["videos"]
    assert (video["frames"], video["first_image_id"]) == (5, 1)
    of_video = [found for found in objects if found["file_name"] == str(clip)]
    assert {found["frame"] for found in of_video} == set(range(5))
    assert all(found["image_id"] == 1 + found["frame"] for found in of_video)
    assert len(of_video) == video["objects"]
    with VideoReader(Path(video["drawing"])) as drawn, VideoReader(clip) as given:
        assert drawn._stream.codec.name == "h264"
        drawn_frames, given_frames = list(drawn), list(given)
    assert len(drawn_frames) == 5
    for (ours, our_time), (theirs, their_time) in zip(drawn_frames, given_frames, strict=True):
        assert ours.shape == theirs.shape == (120, 150, 3)
        assert our_time * drawn.time_base == their_time * given.time_base
        assert np.abs(ours.astype(int) - theirs).max() > 50
    assert not list(tmp_path.rglob("*.partial*"))


def test_a_video_is_turned_upright(photos, tmp_path):
    clip, turned = tmp_path / "clip.mp4", tmp_path / "turned.mp4"
    write_video(clip, 2, (160, 120), photos / "000000.jpg")
    one = 1 << 16
    plain = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    before, after = clip.read_bytes().split(b"tkhd")  # the header of the only track
    turned.write_bytes(before + b"tkhd" + after.replace(plain, clockwise, 1))
    with VideoReader(clip) as lying, VideoReader(turned) as upright:
        for (given, _), (seen, _) in zip(lying, upright, strict=True):
            assert np.array_equal(seen, np.rot90(given, -1))


def test_a_video_may_have_metadata_that_are_no_text(photos, tmp_path):
    clip = tmp_path / "clip.mp4"
    write_video(clip, 2, (160, 120), photos / "000000.jpg")
    content = clip.read_bytes()
    assert content.count(b"Lavf") == 1  # the program that wrote it
    clip.write_bytes(content.replace(b"Lavf", b"\xff\xe9vf"))
    with VideoReader(clip) as frames:
        assert len(list(frames)) == 2


def test_a_video_that_breaks_off_counts_up_to_there(predict, photos, tmp_path, capsys):
    clip = tmp_path / "clip.mp4"
    write_video(clip, 30, (160, 120), photos / "000000.jpg")
    damaged = bytearray(clip.read_bytes())
    index = damaged.rfind(b"moov") - 4  # stands at the end; without it nothing opens
    damaged[index // 2 : index] = bytes(index - index // 2)
    clip.write_bytes(damaged)
    assert predict("--input", clip, "--no-drawings") == 0
    _, results = read(tmp_path / "out")
    (video,) = results["videos"]
    assert 0 < video["frames"] < 30
    assert f"after {video['frames']} frames" in results["unreadable"][str(clip)]
    assert str(clip) in capsys.readouterr().err


def test_class_names_come_with_the_run(predict, photos, tmp_path, capsys):
    gone = [f"dataloader.{split}.dataset.names=gone" for split in ("train", "test")]
    assert predict("--input", photos, "--no-drawings", *gone) == 0
    names = [category["name"] for category in read(tmp_path / "out")[1]["categories"]]
    assert names == ["cat", "coin", "cup", "motorcycle", "rocket"]
    assert predict("--input", photos, *gone, "dataset.categories=[]") == 2
    assert "the classes are not known" in error_of(capsys)


def test_classes_of_coco_are_known_without_its_files():
    (recipe,) = Path("configs/detection/coco").glob("mask_rcnn_rev_vit_base_100ep.py")
    categories = categories_of(load_config(str(recipe)))
    assert len(categories) == 80 and categories[-1] == {"id": 90, "name": "toothbrush"}


def test_a_recipe_does_as_well_as_a_run(predict, photos, tmp_path):
    assert predict("--input", photos, "--no-drawings", *SMALL[:2], *FEW, config=DEMO) == 0
    assert predict("--input", photos, output=tmp_path / "run") == 0
    assert read(tmp_path / "out")[0] == read(tmp_path / "run")[0]


def test_channels_are_in_the_order_of_the_recipe():
    mapper = load_config(DEMO).dataloader.test.mapper
    pixels = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
    rgb = Preparation(mapper)(0, pixels).model_input["image"]
    mapper.image_format = "BGR"
    bgr = Preparation(mapper)(0, pixels).model_input["image"]
    assert rgb.shape == (3, 5, 4) and torch.equal(rgb, torch.from_numpy(pixels).permute(2, 0, 1))
    assert torch.equal(bgr, rgb.flip(0))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--threshold", "1.5"], ["--threshold 1.5", "0 to 1"]),
        (["--batch-size", "0"], ["--batch-size 0"]),
        (["--workers", "-1"], ["--workers -1"]),
        (["--device", "cuda:99"], ["cuda:99", "--device cpu"]),
        (["--device", "abacus"], ["abacus", "--device cpu"]),
        (["--input", "nothing/*.jpg"], ["nothing/*.jpg", "matches"]),
        (["--input", "docs/heads.md"], ["docs/heads.md"]),
        (["--input", "backbones"], ["backbones", "no picture or video", ".jpg"]),
        (["--weights", "no.pth"], ["no.pth", "does not exist"]),
        (["model.backbone.net.model.depth=3"], ["another architecture"]),
        (["model.backbone.net.model.dpeth=3"], ["dpeth", "depth"]),
        (["model.roi_heads.num_classes=7"], ["7 classes", "5 categories"]),
        (["--output", "README.md"], ["--output=README.md cannot be made", "name another folder"]),
    ],
)
def test_bad_arguments(predict, photos, capsys, arguments, words):
    given = [] if "--input" in arguments else ["--input", photos]
    assert predict(*given, *arguments) == 2
    message = error_of(capsys)
    assert all(word in message for word in words), message
