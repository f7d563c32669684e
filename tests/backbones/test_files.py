"""Files: found by what a user names, written whole or not at all, cut where a run resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backbones.common.console import name_unreadable
from backbones.common.errors import UserError
from backbones.common.files import cut_lines, find_files, read_class_names, replacing, write_json
from tests.backbones.helpers import Capture


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("1 red.png", "2.PNG", "deep/3.png", "notes.txt", "empty/notes.txt", "x[1].png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).touch()
    return tmp_path / "photos"


def find(*arguments: Path, passed_over: Path | None = None) -> list[Path]:
    names = [str(argument) for argument in arguments]
    is_png = lambda path: path.suffix.lower() == ".png"  # noqa: E731
    return find_files(names, is_png, "image (.png)", passed_over=passed_over)


def test_files_folders_and_patterns(photos: Path) -> None:
    first, second, third, odd = (
        photos / name for name in ("1 red.png", "2.PNG", "deep/3.png", "x[1].png")
    )
    assert find(third, photos) == [third, first, second, odd]  # each once
    assert find(photos / "*.png") == [first, odd]
    assert find(photos / "**" / "*.png") == [first, third, odd]
    assert find(photos / "d*") == [third]
    assert find(photos / "notes.txt") == [photos / "notes.txt"]  # whoever names it means it
    assert find(odd) == [odd]
    assert find(photos, passed_over=photos / "deep") == [first, second, odd]


def test_hidden_files_and_links(photos: Path) -> None:
    (photos / "._1 red.png").touch()
    (photos / ".cache").mkdir()
    (photos / ".cache/4.png").touch()
    (photos / "deep/up").symlink_to(photos)
    (photos / "gone.png").symlink_to(photos / "nothing")
    before = find(photos)
    assert [path.name for path in before] == ["1 red.png", "2.PNG", "3.png", "x[1].png"]
    (photos.parent / "elsewhere").mkdir()
    (photos.parent / "elsewhere/5.png").touch()
    (photos / "linked").symlink_to(photos.parent / "elsewhere")
    assert {*find(photos)} - {*before} == {photos / "linked/5.png"}
    assert find(photos / "._1 red.png") == [photos / "._1 red.png"]


def test_what_names_no_file_is_an_error(photos: Path) -> None:
    for argument in (photos / "nowhere.png", photos / "*.gif"):
        with pytest.raises(UserError, match=r"^--input .*: no such file or folder"):
            find(argument)
    with pytest.raises(UserError, match=r"empty: holds no image \(\.png\)$"):
        find(photos, photos / "empty")
    with pytest.raises(UserError, match="or only those in "):
        find(photos / "deep", passed_over=photos / "deep")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "new" / "x.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    with pytest.raises(KeyError), replacing(file) as partial:
        partial.write_text("half")
        raise KeyError
    assert json.loads(file.read_text()) == {"a": 1}
    assert list(file.parent.iterdir()) == [file], "a partial file is left"
    write_json(file, {"a": [float("nan"), {"b": (1.5, float("inf"))}]})
    assert json.loads(file.read_text(), parse_constant=pytest.fail) == {
        "a": [None, {"b": [1.5, None]}]
    }


def test_lines_that_are_not_kept_are_cut_and_half_a_line_too(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    cut_lines(file, lambda line: True)
    assert not file.exists()
    file.write_text("step\n1\n2\n3")
    cut_lines(file, lambda line: line != "1\n")
    assert file.read_text() == "step\n2\n"


def test_many_unreadable_files_are_counted_and_some_named(capsys: Capture) -> None:
    name_unreadable({}, None)
    assert capsys.readouterr().err == ""
    unreadable = {f"{i}.png": "damaged" for i in range(1021)}
    name_unreadable(unreadable, None)
    assert capsys.readouterr().err.count(".png: damaged\n") == 1021
    name_unreadable(unreadable, "all.json")
    header, *named, more = capsys.readouterr().err.splitlines()
    assert header == "1,021 unreadable:" and named[0] == "  0.png: damaged"
    assert more == "  and 1,001 more, see all.json" and len(named) == 20


def test_names_of_classes_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("\ufeffcat\r\n dog \n\n", encoding="utf-8")
    assert read_class_names(file, 2) == ["cat", "dog"]
    with pytest.raises(UserError, match="names 2 classes, the model's head has 3"):
        read_class_names(file, 3)
