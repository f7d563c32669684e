"""The command predict: the five likeliest classes in their order, and features."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

import backbones
from backbones.__main__ import main
from backbones.commands.predict import default_names
from backbones.common.images import eval_transform, read_image
from backbones.registry import MODELS
from tests.backbones.helpers import Capture, refused
from tests.backbones.image_data import RANKING, save_colour_model, save_image, save_truncated

NAMES = ["Ampel", "Blatt", "Casino", "Dose", "Esel", "Feder"]


@pytest.fixture
def weights(tmp_path: Path) -> str:
    return save_colour_model(tmp_path / "colours.safetensors")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three photographs of one colour each, one of them in a folder."""
    folder = tmp_path / "photos"
    save_image(folder / "1 red.png", "red")
    save_image(folder / "2.JPG", "blue", (70, 33))
    save_image(folder / "deep" / "3.png", "green")
    (folder / "notes.txt").touch()
    return folder


def run(arguments: list[str], weights: str) -> None:
    more = ["--weights", weights, "--device", "cpu", "--workers", "0"]
    assert main(["predict", *arguments, *more]) == 0


def test_the_five_likeliest(photos: Path, weights: str, tmp_path: Path, capsys: Capture) -> None:
    names, file = tmp_path / "names.txt", tmp_path / "new" / "out.json"
    names.write_text("\n".join(NAMES) + "\n")
    broken = save_truncated(photos / "broken.png")
    more = ["--classes", str(names), "--json", str(file), "--batch-size", "2"]
    run([str(photos), *more], weights)
    result: dict[str, Any] = json.loads(file.read_text())
    expected = {"1 red.png": "red", "2.JPG": "blue", "deep/3.png": "green"}
    captured = capsys.readouterr()
    lines = iter(captured.out.splitlines())
    model = backbones.load_model(weights).eval()
    for entry, (name, colour) in zip(result["predictions"], expected.items(), strict=True):
        with torch.no_grad():
            x = eval_transform(32, 32)(read_image(photos / name)).unsqueeze(0)
            probabilities = model(x)[0].softmax(0)
        assert next(lines) == entry["file"] == str(photos / name)
        for place, index in zip(entry["classes"], RANKING[colour][:5], strict=True):
            assert (place["index"], place["name"]) == (index, NAMES[index])
            assert place["probability"] == pytest.approx(float(probabilities[index]))
            assert next(lines) == f"{100 * place['probability']:7.2f} %  {NAMES[index]}"
    assert not list(lines)
    assert captured.err.startswith(f"1 unreadable:\n  {broken}: ")
    assert list(result["unreadable"]) == [str(broken)]


def test_features(photos: Path, weights: str, tmp_path: Path, capsys: Capture) -> None:
    save_truncated(photos / "0.png")
    file = tmp_path / "features.npz"
    run([str(photos), "--features", str(file), "--batch-size", "1"], weights)
    saved = numpy.load(file)  # refuses pickles
    files = [photos / name for name in ("1 red.png", "2.JPG", "deep/3.png")]
    assert saved["files"].tolist() == [str(path) for path in files]
    model = backbones.load_model(weights).eval()
    with torch.no_grad():
        x = torch.stack([eval_transform(32, 32)(read_image(path)) for path in files])
        expected = model.forward_features(x).mean(1)
    assert saved["features"].dtype == numpy.float32
    numpy.testing.assert_allclose(saved["features"], expected.numpy(), atol=1e-6)
    assert len(numpy.unique(saved["features"].round(3), axis=0)) == 3
    out, err = capsys.readouterr()
    assert "features 3 x 24, of 3 of 4 images" in out and f"{photos / '0.png'}: " in err


def test_features_need_no_head(photos: Path, tmp_path: Path) -> None:
    trunk = backbones.create_model("rev_vit_tiny", img_size=32, num_classes=0)
    plain, file = tmp_path / "trunk.pth", tmp_path / "features.npz"
    torch.save(trunk.state_dict(), plain)
    named = ["--model", "rev_vit_tiny", "--img-size", "32"]
    run([str(photos), *named, "--features", str(file)], str(plain))
    assert numpy.load(file)["features"].shape == (3, 384)


def test_a_photograph_that_lies_on_its_side(tmp_path: Path) -> None:
    """A wide crop of its middle is red as it should be seen, and half green as it is stored."""
    upright = Image.new("RGB", (80, 80), (0, 255, 0))
    upright.paste((255, 0, 0), (0, 24, 80, 56))
    exif = Image.Exif()
    exif[0x0112] = 8  # a viewer turns it by 90 degrees to the left
    upright.rotate(-90).save(tmp_path / "side.png", exif=exif)
    assert read_image(tmp_path / "side.png", upright=True).tobytes() == upright.tobytes()
    read_image(tmp_path / "side.png").save(tmp_path / "stored.png")  # without its EXIF data
    weights, file = tmp_path / "wide.safetensors", tmp_path / "out.json"
    save_colour_model(weights, img_size=(32, 64))
    for name, colour in (("side", "red"), ("stored", "green")):
        run([str(tmp_path / f"{name}.png"), "--json", str(file)], str(weights))
        (entry,) = json.loads(file.read_text())["predictions"]
        assert entry["classes"][0]["index"] == RANKING[colour][0]


def test_what_is_no_image_is_one_line(
    photos: Path, weights: str, tmp_path: Path, capsys: Capture
) -> None:
    image, own = str(photos / "1 red.png"), ["--weights", weights]
    (tmp_path / "nothing").mkdir()
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    (tmp_path / "latin.txt").write_bytes(b"\xe9\n")
    for arguments, message in (
        ([image, "nowhere.jpg", *own], "error: nowhere.jpg: no such file or folder"),
        ([str(tmp_path / "nothing"), *own], "nothing: holds no image (.jpg, "),
        ([str(photos / "notes.txt"), *own], "none of the 1 images could be read"),
        ([image, *own, "--classes", str(tmp_path / "names.txt")], "names 2 classes, the model's"),
        ([image, *own, "--classes", str(tmp_path / "latin.txt")], "as text in UTF-8"),
        ([image, *own, "--classes", str(tmp_path / "no.txt")], "no.txt"),
        ([image, *own, "--features", "x.safetensors"], "x.safetensors should end in .npz"),
        ([image, *own, "--features", "x.npz", "--json", "x.json"], "--features goes without"),
    ):
        assert message in refused(["predict", *arguments, "--workers", "0"], capsys)


def test_addresses_and_released_weights(
    photos: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file behind an address, as --weights, and as what is released under a model's name."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    state = backbones.create_model("rev_vit_tiny", img_size=32).state_dict()
    torch.save(state, tmp_path / "released.pth")
    address = (tmp_path / "released.pth").as_uri()
    released = replace(MODELS["rev_vit_tiny"], weights=address)
    monkeypatch.setitem(MODELS, "rev_vit_tiny", released)
    named = [str(photos), "--model", "rev_vit_tiny", "--img-size", "32"]
    run(named, address)
    by_address = capsys.readouterr().out
    assert main(["predict", *named, "--pretrained", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == by_address
    names = {line.partition("%  ")[2] for line in by_address.splitlines() if "%  " in line}
    assert names and names <= set(default_names(1000))
    del state["head.bias"]
    torch.save(state, tmp_path / "half.pth")
    line = refused(["predict", *named, "--weights", str(tmp_path / "half.pth")], capsys)
    assert "half.pth has no head.bias" in line


def test_imagenet_names() -> None:
    names = default_names(1000)
    assert (names[0], names[281], names[999]) == ("tench", "tabby", "toilet tissue")
    assert default_names(3) == ["0", "1", "2"]


@pytest.mark.skipif(os.name != "posix" or sys.platform == "darwin", reason="names must be Unicode")
def test_a_name_that_is_no_unicode(tmp_path: Path, weights: str, capsys: Capture) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff.png"))
    save_image(tmp_path / "plain.png", "red").rename(odd)
    file = tmp_path / "out.json"
    run([str(odd), "--json", str(file)], weights)
    assert capsys.readouterr().out.splitlines()[0] == rf"{tmp_path}/odd\xff.png"
    assert json.loads(file.read_text())["predictions"][0]["file"] == str(odd)
