"""Checkpoints on disk: whole or not there, and never executed."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from torch import nn

from revdet.checkpoint import Checkpointer
from revdet.errors import UserError


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_round_trip(tmp_path):
    saved, loaded = nn.Linear(3, 2), nn.Linear(3, 2)
    Checkpointer(saved, str(tmp_path)).save("one", iteration=7)
    rest = Checkpointer(loaded, str(tmp_path)).resume_or_load("", resume=True)
    assert same(saved, loaded)
    assert rest["iteration"] == 7


@pytest.mark.parametrize("fails", ["torch.save", "os.fsync"])
def test_a_write_that_fails_leaves_the_last_checkpoint(tmp_path, monkeypatch, fails):
    model = nn.Linear(3, 2)
    checkpointer = Checkpointer(model, str(tmp_path))
    checkpointer.save("last")
    before = (tmp_path / "last.pth").read_bytes()

    def disk_full(*_args, **_kwargs):
        raise OSError("no space left on device")

    with torch.no_grad():
        model.weight.zero_()
    monkeypatch.setattr(fails, disk_full)
    with pytest.raises(OSError, match="no space"):
        checkpointer.save("last")
    assert (tmp_path / "last.pth").read_bytes() == before
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "last.pth")


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "code", "no weights"])
def test_bad_files_end_in_one_line_and_leave_the_model_alone(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.pth"
    model, untouched = nn.Linear(3, 2), nn.Linear(3, 2)
    untouched.load_state_dict(model.state_dict())
    torch.save({"model": nn.Linear(3, 2).state_dict()}, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("<html>not found</html>")
    elif kind == "code":
        path.write_bytes(pickle.dumps(Malicious()))
    else:
        torch.save({"model": {}}, path)
    with pytest.raises(UserError, match=r"bad\.pth") as error:
        Checkpointer(model).load(str(path))
    assert "\n" not in str(error.value)
    assert same(model, untouched)
    assert not (tmp_path / "executed").exists()


def test_missing_and_unknown_weights(tmp_path):
    Checkpointer(nn.Sequential(nn.Linear(3, 2)), str(tmp_path)).save("one")
    path = str(tmp_path / "one.pth")
    larger = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"2 weights are missing \(first: 1\.weight\)"):
        Checkpointer(larger).load(path)
    # Starting from pretrained weights, what is not there is trained from scratch.
    checkpointer = Checkpointer(larger)
    checkpointer.strict = False
    checkpointer.load(path)
    foreign = Checkpointer(nn.Conv2d(1, 1, 1))
    foreign.strict = False
    with pytest.raises(UserError, match="another architecture"):
        foreign.load(path)
