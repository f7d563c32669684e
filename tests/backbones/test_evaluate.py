"""The command evaluate: exact accuracies of a model whose every answer is known."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from PIL import Image
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import backbones
from backbones.__main__ import main
from backbones.commands.evaluate import find_classes
from backbones.common.images import ImageFiles, eval_transform, read_image
from backbones.registry import MODELS
from tests.backbones.helpers import Capture, refused
from tests.backbones.image_data import MEAN, STD, save_colour_model, save_image, save_truncated
from tests.backbones.test_weights import VIDEO, VIT

# The colours of the images in each class folder. By RANKING, 4 of these 9 are of the likeliest
# class, and 2 of class 5, the least likely one of six.
IMAGES = {
    "a": "red red blue",
    "b": "green",
    "c": "blue",
    "d": "green",
    "e": "red",
    "f": "blue green",
}
TOP1, TOP5 = 100 * 4 / 9, 100 * 7 / 9


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The images, and beside their folder the weights of a model of six classes."""
    save_colour_model(tmp_path / "colours.safetensors")
    for folder, colours in IMAGES.items():
        for index, colour in enumerate(colours.split()):
            save_image(tmp_path / "data" / folder / f"{index}_{colour}.png", colour)
    return tmp_path / "data"


def arguments(data: Path, *more: str, weights: str = "colours.safetensors") -> list[str]:
    """Of an evaluation, with a file of weights beside the data."""
    file = str(data.parent / weights)
    return ["evaluate", "--data", str(data), "--weights", file, "--workers", "0", *more]


def run(data: Path, *more: str, weights: str = "colours.safetensors") -> dict[str, Any]:
    """The JSON of an evaluation."""
    file = data.parent / "result.json"
    extra = ["--device", "cpu", "--json", str(file), *more]
    assert main(arguments(data, *extra, weights=weights)) == 0
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def test_the_counted_accuracy(data: Path, capsys: Capture) -> None:
    result = run(data)
    assert (result["top1"], result["top5"]) == (pytest.approx(TOP1), pytest.approx(TOP5))
    assert (result["evaluated"], result["images"], result["classes"]) == (9, 9, 6)
    assert result["unreadable"] == {} and result["published_top1"] is None
    out = capsys.readouterr().out
    assert f"44.44 top-1, 77.78 top-5 on 9 of 9 images in {data}\n" in out
    assert "published" not in out
    data.rename(data.parent / "val")
    (data / "train").mkdir(parents=True)
    (data.parent / "val").rename(data / "val")
    assert run(data)["top1"] == result["top1"]


@pytest.mark.parametrize("more", (["--workers", "2"], ["--batch-size", "2"], ["--img-size", "48"]))
def test_options_do_not_change_it(data: Path, more: list[str]) -> None:
    """Nor does the size, since the images have one colour."""
    save_truncated(data / "b" / "broken.png")
    save_truncated(data / "c" / "broken.png")
    expected = run(data)
    assert expected["evaluated"] == 9 and len(expected["unreadable"]) == 2
    result = run(data, *more)
    assert result["img_size"] == (48 if "--img-size" in more else 32)
    assert {**result, "img_size": 32} == expected


def test_damaged_images_are_counted_and_named(data: Path, capsys: Capture) -> None:
    truncated = save_truncated(data / "a" / "truncated.png")
    text, empty, deep = (data / "b" / name for name in ("text.jpg", "empty.png", "deep.png"))
    text.write_text("no image")
    empty.touch()
    Image.new("I;16", (8, 8)).save(deep)
    result = run(data, "--batch-size", "1")
    assert (result["evaluated"], result["images"]) == (9, 13)
    assert result["top1"] == pytest.approx(TOP1)  # of those that were read
    assert result["unreadable"].keys() == {str(path) for path in (truncated, text, empty, deep)}
    assert "8 bits" in result["unreadable"][str(deep)]
    out, err = capsys.readouterr()
    assert "on 9 of 13 images" in out and err.startswith("4 unreadable:\n")
    for path in (truncated, text, empty, deep):
        assert len(re.findall(rf"^  {re.escape(str(path))}: \w.*$", err, re.MULTILINE)) == 1
        assert err.count(str(path)) == 1


@pytest.mark.parametrize("amp", (None, "bfloat16", "float16"))
def test_autocast_is_in_force(data: Path, amp: str | None) -> None:
    seen: set[torch.dtype] = set()

    def look(module: nn.Module, _args: object, output: Any) -> None:
        if isinstance(module, nn.Linear):
            seen.add(output.dtype)

    handle = register_module_forward_hook(look)
    result = run(data, *([] if amp is None else ["--amp", amp]))
    handle.remove()
    assert seen == {getattr(torch, amp or "float32")}
    assert result["top1"] == pytest.approx(TOP1) and result["precision"] == (amp or "float32")


def test_outputs_that_are_not_finite_end_it(data: Path, capsys: Capture) -> None:
    save_colour_model(data.parent / "large.safetensors", scale=1e5)
    given = arguments(data, "--device", "cpu", weights="large.safetensors")
    line = refused([*given, "--amp", "float16"], capsys)
    assert "0_red.png is not finite; try another --amp" in line
    assert main(given) == 0


def test_the_transform_is_the_originals(tmp_path: Path) -> None:
    """Done by hand: bicubic to 256/224 of the crop, its centre, ImageNet's mean and deviation."""
    pixels = torch.randint(256, (90 * 61 * 3,), dtype=torch.uint8)
    image = Image.frombytes("RGB", (90, 61), bytes(pixels.tolist()))
    small = image.resize((int(90 * 64 / 61), 64), Image.Resampling.BICUBIC)
    left = round((small.width - 56) / 2)
    crop = small.crop((left, 4, left + 56, 60))
    expected = torch.tensor(list(crop.tobytes()), dtype=torch.float64).view(56, 56, 3) / 255
    expected = (expected - torch.tensor(MEAN)) / torch.tensor(STD)
    actual = eval_transform(56, 56)(image)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected.permute(2, 0, 1), atol=1e-6, rtol=0)
    assert eval_transform(224, 224).transforms[0].size == [256]
    assert eval_transform(32, 64)(image).shape == (3, 32, 64)


def test_an_error_of_the_code_is_no_unreadable_image(tmp_path: Path) -> None:
    files = ImageFiles([str(save_image(tmp_path / "x.png", "red"))], 32, 32)
    files.transform = None
    with pytest.raises(TypeError):
        files[0]


def test_other_modes_become_rgb(tmp_path: Path) -> None:
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        path = tmp_path / f"{mode}.tif"
        Image.new(mode, (4, 4)).save(path)
        assert read_image(path).mode == "RGB"


def test_missing_and_misnamed_folders(data: Path, tmp_path: Path, capsys: Capture) -> None:
    def line(folder: Path) -> str:
        return refused([*arguments(data), "--data", str(folder)], capsys)

    assert "nowhere is no folder: give" in line(tmp_path / "nowhere")
    assert "is no folder" in line(data / "a" / "0_red.png")
    assert "images directly in it (0_red.png, 1_red.png, 2_blue.png)" in line(data / "a")
    for name in IMAGES:
        save_truncated(tmp_path / "bad" / name / "x.png")
    assert "none of the 6 images could be read" in line(tmp_path / "bad")
    (tmp_path / "nothing").mkdir()
    assert "has no folders" in line(tmp_path / "nothing")
    (data / ".cache").mkdir()  # hidden, so no class
    find_classes(data)
    (data / "g").mkdir()
    (data / "g" / "notes.txt").touch()
    assert re.search(r"1 of 7 class folders in .* have no image \(\.jpg, .*\): g$", line(data))
    save_image(data / "g" / "x.png", "red")
    assert re.search(r"head has 6 classes, .* has 7 of them \(a, b, c and 4 more\)$", line(data))
    assert "result.json" not in " ".join(path.name for path in tmp_path.iterdir())


def test_bad_options_are_one_line(data: Path, tmp_path: Path, capsys: Capture) -> None:
    base, weights = ["evaluate", "--data", str(data)], str(tmp_path / "colours.safetensors")
    plain = tmp_path / "plain.pth"
    torch.save(backbones.load_model(weights).state_dict(), plain)
    trunk, headless = tmp_path / "trunk.safetensors", {"num_classes": 0, "depth": 1}
    backbones.save_weights(backbones.create_model("rev_vit_tiny", **headless), trunk)
    for arguments, message in (
        (["--weights", "nowhere.pth"], "cannot read nowhere.pth"),
        (["--pretrained"], "--pretrained needs --model NAME"),
        (["--pretrained", "--model", "rev_vit_tiny"], "no weights are released"),
        (["--weights", str(plain)], "does not say which model it is of; add --model NAME"),
        (["--weights", str(plain), "--model", "rev_vit_tinny"], "did you mean rev_vit_tiny"),
        (["--weights", str(plain), "--model", "rev_vit_tiny"], "does not fit this RevViT"),
        (["--weights", weights, "--model", "vit_tiny"], "is of rev_vit_tiny, not of vit_tiny"),
        (["--weights", str(VIDEO)], "takes clips, not images"),
        (["--weights", str(trunk)], "has no head"),
        (["--weights", weights, "--json", str(tmp_path)], "is a folder"),
    ):
        assert message in refused([*base, *arguments], capsys)
    for arguments in ([], ["--weights", weights, "--batch-size", "0"]):
        with pytest.raises(SystemExit) as stop:
            main([*base, *arguments])
        assert stop.value.code == 2


def test_a_missing_library(data: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    line = refused(arguments(data), capsys)
    assert line.endswith("needs torchvision: pip install 'revvit-toolkit[images]'\n")


def test_weights_by_name_bring_their_own_head(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published number of classes gives way to the file's, and the score to nothing."""
    monkeypatch.setitem(MODELS, "rev_vit_tiny", replace(MODELS["rev_vit_tiny"], top1=12.5))
    model = backbones.create_model("rev_vit_tiny", img_size=32, num_classes=6)
    torch.save(model.state_dict(), data.parent / "plain.pth")
    result = run(data, "--model", "rev_vit_tiny", "--img-size", "32", weights="plain.pth")
    assert (result["model"], result["published_top1"]) == ("rev_vit_tiny", None)
    backbones.save_weights(model, own := data.parent / "own.safetensors")
    assert {**result, "weights": str(own)} == run(data, weights=own.name)


def test_files_say_what_they_are(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And are opened once."""
    opened = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **more: opened.append(args[0]) or function(*args, **more)

    monkeypatch.setattr(safetensors, "safe_open", counted(safetensors.safe_open))
    monkeypatch.setattr(torch, "load", counted(torch.load))
    assert run(data)["model"] == "RevViT" and len(opened) == 1
    (data / "f").rename(data.parent / "f")
    result = run(data, weights=str(VIT))
    assert result["classes"] == 5 and len(opened) == 2
    assert result["model"] == "RevViT" and result["published_top1"] is None


def test_published_scores(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model of the released shape with 1000 classes, whatever it is called."""
    scored = replace(MODELS["rev_vit_tiny"], top1=12.5, top5=34.75)
    monkeypatch.setitem(MODELS, "rev_vit_tiny", scored)
    model = backbones.create_model("rev_vit_base", img_size=32, embed_dim=192, num_heads=3)
    backbones.save_weights(model, tmp_path / "tiny.safetensors")
    data = tmp_path / "data"
    for label in range(1000):
        folder = data / f"n{label:08d}"
        folder.mkdir(parents=True)
        (folder / "x.png").touch()
    save_image(folder / "y.png", "red")
    result = run(data, "--batch-size", "999", weights="tiny.safetensors")
    assert (result["model"], result["published_top1"]) == ("rev_vit_tiny", 12.5)
    assert len(result["unreadable"]) == 1000
    out, err = capsys.readouterr()
    scores = r"[\d.]+ top-1 \(published 12\.5\), [\d.]+ top-5 \(published 34\.75\)"
    assert re.match(rf"{scores} on 1 of 1,001 images", out.splitlines()[1])
    assert "note" not in err
    folder.rename(data / "tench")
    run(data, "--batch-size", "999", weights="tiny.safetensors")
    assert "not named by wnid" in capsys.readouterr().err
