"""What reaches the model: every video once, the same number of steps everywhere, no twins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backbones.common.errors import UserError
from revvideo.config import load_config
from revvideo.data.loader import ResumableLoader, ResumableSampler
from revvideo.data.mixing import Mixing
from revvideo.data.videos import VideoData
from revvideo.run import main
from revvideo.scan import main as scan
from revvideo.training.evaluation import accuracy, join_scores
from revvideo.training.module import Batch, VideoModule
from tests.revvideo.tiny_set import arguments, build_set

MOTION = "configs/video/demo/motion.yaml"


class Positions(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 11

    def __getitem__(self, key: tuple[int, int]) -> int:
        return key[1]


def loader(batches_per_step: int = 1, workers: int = 0) -> ResumableLoader:
    return ResumableLoader(
        Positions(),
        batch_size=4 // batches_per_step,
        sampler=ResumableSampler(11, 4, seed=1),
        batches_per_step=batches_per_step,
        collate_fn=list,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_loader_continues_where_its_state_was_taken(parts, workers):
    whole = loader(parts, workers)
    assert len(whole) == 2 * parts
    expected = [batch for _ in range(3) for batch in whole]
    assert [key for batch in expected for key in batch] == list(range(24))
    for steps in range(6):
        first = loader(parts)
        given = 0
        while given < steps * parts:
            for _ in first:
                given += 1
                if given == steps * parts:
                    break
        second = loader(parts, workers)
        second.load_state_dict(first.state_dict())
        rest = [batch for _ in range(steps // 2, 3) for batch in second]
        assert rest == expected[steps * parts :]


def test_clips_of_one_video_are_no_neighbours(tmp_path, monkeypatch):
    """They would be mixed with each other, and nothing would be mixed."""
    labels = []
    mix = Mixing.__call__

    def record(self: Mixing, video: torch.Tensor, label: torch.Tensor) -> tuple:
        labels.append(video.flatten(1).mean(dim=1).argsort().argsort().tolist())
        return mix(self, video, label)

    monkeypatch.setattr(Mixing, "__call__", record)
    monkeypatch.setattr("revvideo.training.results.draw_curves", lambda *_: None)
    root = build_set(tmp_path / "set", train=4, val=1)
    more = ["augment.repeats=3", "optim.epochs=1", "test.clips=1"]
    assert main(arguments(root, tmp_path / "out", *more)) == 0
    # Three copies of four videos: four different means, then the same four again.
    (ranks,) = labels
    videos = [rank // 3 for rank in ranks]
    assert videos[:4] == videos[4:8] == videos[8:] and len(set(videos[:4])) == 4


def data_to_test(root: Path, output: Path, *overrides: str, **options: object) -> VideoData:
    overrides = (f"data.root={root}", f"train.output_dir={output}", *overrides)
    data = VideoData(load_config(MOTION, overrides), train=False, **options)
    data.prepare_data()
    data.setup("test")
    return data


def test_videos_without_a_label_are_not_counted(tmp_path):
    root = build_set(tmp_path / "set", train=0, val=4)
    paths = sorted(str(path.relative_to(root)) for path in root.glob("val/*/*.mp4"))
    (root / "val.csv").write_text("".join(f"{p} {i % 2 - 1}\n" for i, p in enumerate(paths)))
    data = data_to_test(root, tmp_path / "out", "data.layout=list")
    assert data.val_total == 2 and [r.path for r in data.val_records] == paths[1::2]

    (root / "val.csv").write_text("".join(f"{path} -1\n" for path in paths))
    with pytest.raises(UserError, match="has a label"):
        data_to_test(root, tmp_path / "out", "data.layout=list", classes=["only"])


def test_the_manifests_of_a_scan_save_opening_videos_again(tmp_path, monkeypatch):
    root = build_set(tmp_path / "set", train=0, val=3)
    assert scan([str(root), "--split", "val"]) == 0
    monkeypatch.setattr("revvideo.data.scan.probe", _must_not_be_called)
    assert data_to_test(root, tmp_path / "out").val_total == 3
    assert (tmp_path / "out" / "manifest_val.csv").is_file()


def _must_not_be_called(path: Path) -> None:
    raise AssertionError(f"{path} was opened")


def test_scores_come_in_the_order_of_the_videos_and_once():
    batches = [
        (torch.tensor([3, 1]), torch.tensor([0, 1]), torch.eye(2)),
        (torch.tensor([], dtype=torch.int64), torch.tensor([]), torch.zeros(0, 2)),
        (torch.tensor([2]), torch.tensor([1]), torch.tensor([[0.9, 0.1]])),
    ]
    index, label, values = join_scores(batches)
    assert index.tolist() == [1, 2, 3] and label.tolist() == [1, 1, 0]
    found = accuracy(label, values, of=5)
    assert str(found) == "66.7 top-1, 100.0 top-5 on 3 of 5 videos"
    again = (torch.tensor([1]), torch.tensor([1]), torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="tested twice"):
        join_scores([*batches, again])


def test_top_five_counts_the_five_best():
    values = torch.arange(10.0).repeat(10, 1)  # class 9 is the best, then 8, …
    found = accuracy(torch.arange(10), values.softmax(dim=1), of=10)
    assert (found.top1, found.top5) == (pytest.approx(10), pytest.approx(50))
    assert str(accuracy(torch.zeros(0), torch.zeros(0, 3), of=1234)).endswith("0 of 1,234 videos")


def test_the_softmax_scores_of_the_views_of_a_video_are_averaged():
    class Fixed(torch.nn.Module):
        def forward(self, video: torch.Tensor) -> torch.Tensor:
            return video[:, :2, 0, 0, 0]  # the first pixel of two channels stands for the logits

    module = VideoModule(load_config(MOTION), None)
    module.backbone = Fixed()
    logits = torch.tensor([[9.0, 0.0], [0.0, 3.0], [2.0, 1.0], [0.0, 8.0]])
    video = torch.zeros(4, 3, 1, 1, 1)
    video[:, :2, 0, 0, 0] = logits
    index = torch.tensor([5, 5, 2, 2])
    module._score(Batch(video=video, label=index % 2, index=index, problems=[]), views=2)
    found, label, scores = join_scores(module._scores)
    assert found.tolist() == [2, 5] and label.tolist() == [0, 1]
    expected = logits.softmax(dim=1).view(2, 2, 2).mean(dim=1).flip(0)
    torch.testing.assert_close(scores, expected)
