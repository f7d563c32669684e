"""What reaches the model: every video once, the same number of steps everywhere, no twins."""

from __future__ import annotations

import math
from itertools import chain

import pytest
import torch

from backbones.common.errors import UserError
from backbones.common.seeds import seed_of
from revvideo.config import load_config
from revvideo.data.loader import ResumableLoader, ResumableSampler, batches_to_test
from revvideo.data.mixing import Mixing
from revvideo.data.videos import VideoData
from revvideo.training.evaluation import accuracy, join_scores
from revvideo.training.module import Batch, VideoModule
from tests.revvideo.tiny_set import build_set

MOTION = "configs/video/demo/motion.yaml"


def of_epochs(sampler: ResumableSampler, epochs: int) -> list[tuple[int, int]]:
    keys = []
    for epoch in range(epochs):
        sampler.step = epoch * sampler.steps_per_epoch
        keys += sampler
    return keys


@pytest.mark.parametrize("size, batch", [(24, 4), (23, 4), (10, 3), (7, 7)])
def test_every_video_once_before_any_comes_again(size, batch):
    sampler = ResumableSampler(size, batch)
    assert len(sampler) == batch * sampler.steps_per_epoch == size // batch * batch
    keys = of_epochs(sampler, 12)
    assert len(keys) == 12 * len(sampler)
    assert [position for _, position in keys] == list(range(len(keys)))
    indices = [index for index, _ in keys]
    passes = [indices[i : i + size] for i in range(0, len(indices) - size + 1, size)]
    assert len(passes) >= 8
    for of_pass in passes:
        assert sorted(of_pass) == list(range(size))
    assert len(set(map(tuple, passes))) == len(passes)  # shuffled anew each time


@pytest.mark.parametrize("world", [2, 3])
def test_global_batches_do_not_depend_on_the_number_of_processes(world):
    one = of_epochs(ResumableSampler(50, 6, seed=3), 4)
    shards = [
        of_epochs(ResumableSampler(50, 6 // world, seed=3, rank=rank, world_size=world), 4)
        for rank in range(world)
    ]
    assert len({len(shard) for shard in shards}) == 1
    local = 6 // world
    for step in range(len(one) // 6):
        together = chain.from_iterable(shard[step * local : (step + 1) * local] for shard in shards)
        assert sorted(together) == sorted(one[step * 6 : (step + 1) * 6])


@pytest.mark.parametrize("rank, world", [(0, 1), (1, 2)])
def test_resumes_in_the_middle_of_an_epoch(rank, world):
    whole = of_epochs(ResumableSampler(47, 4, seed=1, rank=rank, world_size=world), 4)
    per_epoch = len(whole) // 4
    resumed = ResumableSampler(47, 4, seed=1, rank=rank, world_size=world)
    resumed.step = 2 * resumed.steps_per_epoch + 3
    assert list(resumed) == whole[2 * per_epoch + 12 : 3 * per_epoch]
    assert len(resumed) == per_epoch


def test_seeds():
    first, again, other = (list(ResumableSampler(40, 4, seed=seed)) for seed in (5, 5, 6))
    assert first == again != other
    assert len({seed_of(a, b) for a in range(30) for b in range(30)}) == 900


@pytest.mark.parametrize("size, batch, world", [(7, 4, 2), (0, 1, 1), (8, 0, 1)])
def test_too_few_videos(size, batch, world):
    with pytest.raises(UserError, match=f"{size} readable .* batch of {batch} on each of {world}"):
        ResumableSampler(size, batch, world_size=world)


@pytest.mark.parametrize("size", [0, 1, 2, 9, 10, 11])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_every_video_is_tested_once_in_equally_many_steps(size, world, batch):
    samplers = [batches_to_test(size, batch, rank=rank, world_size=world) for rank in range(world)]
    shards = [list(sampler) for sampler in samplers]
    steps = math.ceil(math.ceil(size / world) / batch)
    assert {len(sampler) for sampler in samplers} == {len(shard) for shard in shards} == {steps}
    sizes = [sum(map(len, shard)) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    batches = list(chain.from_iterable(shards))
    assert all(len(keys) <= batch for keys in batches)
    assert sorted(chain.from_iterable(batches)) == [(i, i) for i in range(size)]


class Positions(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 11

    def __getitem__(self, key: tuple[int, int]) -> int:
        return key[1]


def loader(batches_per_step: int = 1, workers: int = 0, steps: int = 0) -> ResumableLoader:
    return ResumableLoader(
        Positions(),
        batch_size=4 // batches_per_step,
        sampler=ResumableSampler(11, 4, seed=1),
        batches_per_step=batches_per_step,
        steps=steps,
        collate_fn=list,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_loader_goes_on_behind_any_step(parts, workers):
    whole = loader(parts, workers)
    assert len(whole) == 2 * parts
    expected = [batch for _ in range(3) for batch in whole]
    assert [key for batch in expected for key in batch] == list(range(24))
    for steps in range(6):
        again = loader(parts, workers, steps)
        rest = [batch for _ in range(steps // 2, 3) for batch in again]
        assert rest == expected[steps * parts :]


def test_clips_of_one_video_are_no_neighbours(run, tmp_path, monkeypatch):
    """They would be mixed with each other, and nothing would be mixed."""
    labels = []
    mix = Mixing.__call__

    def record(self: Mixing, video: torch.Tensor, label: torch.Tensor) -> tuple:
        labels.append(video.flatten(1).mean(dim=1).argsort().argsort().tolist())
        return mix(self, video, label)

    monkeypatch.setattr(Mixing, "__call__", record)
    root = build_set(tmp_path / "set", train=4, val=1)
    more = ["augment.repeats=3", "optim.epochs=1"]
    assert run(tmp_path / "out", *more, root=root) == 0
    # Three copies of four videos: four different means, then the same four again.
    (ranks,) = labels
    videos = [rank // 3 for rank in ranks]
    assert videos[:4] == videos[4:8] == videos[8:] and len(set(videos[:4])) == 4


def test_videos_without_a_label_are_not_counted(videos, tmp_path):
    paths = sorted(str(path.relative_to(videos)) for path in videos.glob("val/*/*.mp4"))
    listed = tmp_path / "list.txt"
    overrides = [f"data.root={videos}", f"data.annotations={listed}", "data.layout=list"]
    config = load_config(MOTION, [*overrides, f"train.output_dir={tmp_path}"])
    listed.write_text("".join(f"{path} {i % 2 - 1}\n" for i, path in enumerate(paths)))
    data = VideoData(config, train=False)
    data.prepare_data()
    data.setup("test")
    assert data.val_total == 3 and [record.path for record in data.val_records] == paths[1::2]

    listed.write_text("".join(f"{path} -1\n" for path in paths))
    data = VideoData(config, train=False, classes=["only"])
    data.prepare_data()
    with pytest.raises(UserError, match="has a label"):
        data.setup("test")


def test_scores_come_in_the_order_of_the_videos_and_once():
    batches = [
        (torch.tensor([3, 1]), torch.tensor([0, 1]), torch.eye(2)),
        (torch.tensor([], dtype=torch.int64), torch.tensor([]), torch.zeros(0, 2)),
        (torch.tensor([2]), torch.tensor([1]), torch.tensor([[0.9, 0.1]])),
    ]
    index, label, values = join_scores(batches)
    assert index.tolist() == [1, 2, 3] and label.tolist() == [1, 1, 0]
    assert str(accuracy(label, values, of=5)) == "66.7 top-1, 100.0 top-5 on 3 of 5 videos"
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
