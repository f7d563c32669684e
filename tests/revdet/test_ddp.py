"""Two processes train as one that averages the gradients of their batches."""

from __future__ import annotations

import gc
import pickle
import shutil
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from detectron2.engine.defaults import create_ddp_model
from detectron2.engine.hooks import CallbackHook
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh

import backbones
from backbones.common.errors import UserError
from backbones.common.seeds import seed_of
from backbones.common.sharding import gathered, is_sharded, shard
from backbones.engine.policies import blocks_of
from revdet.training.checkpoint import (
    Checkpointer,
    checkpoint_to_resume,
    load_initial_weights,
    periodic_checkpoints,
)
from revdet.training.saving import Saving
from revdet.training.trainer import Trainer
from tests import forked
from tests.revdet.conftest import detector

WORLD = 2
STEPS = 5
SEED = 3
SIDE = 48

# Options of DistributedDataParallel, and the batches of each process in an iteration.
MODES: dict[str, tuple[dict[str, bool], int]] = {
    "plain": ({}, 1),
    "find_unused_parameters": ({"find_unused_parameters": True}, 1),
    "static_graph": ({"static_graph": True}, 1),
    "accumulate": ({}, 2),
    "static_graph, accumulate": ({"static_graph": True}, 2),
    "fsdp": ({}, 1),
    "fsdp, accumulate": ({}, 2),
}

# Policies of a sharded trunk, and its depths.
HELD = [("store", 4), ("store", 16), ("reversible", 4), ("reversible", 16)]

OVERRIDES = [
    f"model.backbone.net.model.img_size={SIDE}",
    "model.backbone.net.model.embed_dim=24",
    "model.backbone.net.model.depth=2",
    "model.backbone.net.model.drop_path_rate=0.4",
    "model.proposal_generator.post_nms_topk=[20,10]",
    "model.roi_heads.batch_size_per_image=8",
]


def build(mode: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = detector(*OVERRIDES)
    if "find_unused" in mode:
        model.unused = nn.Linear(2, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


def batch(iteration: int, index: int, side: int = SIDE) -> list[dict[str, Any]]:
    """The ``index``-th batch of an iteration, counted through all processes: one noisy image."""
    generator = torch.Generator().manual_seed(100 * iteration + index)
    truth = Instances((side, side))
    corners = torch.randint(0, side // 2, (2, 2), generator=generator).float()
    truth.gt_boxes = Boxes(torch.cat([corners, corners + side // 2], dim=1))
    truth.gt_classes = torch.randint(0, 5, (2,), generator=generator)
    truth.gt_masks = BitMasks(torch.rand(2, side, side, generator=generator) > 0.5)
    image = torch.randint(0, 256, (3, side, side), generator=generator, dtype=torch.uint8)
    return [{"image": image, "height": side, "width": side, "instances": truth}]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    whole = gathered(dict(model.named_parameters()), keep=True)
    return {name: value.detach().clone() for name, value in whole.items()}


def run(rank: int, folder: str) -> None:
    """Train in every mode, and save the parameters after each step and the reductions made."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD
    )
    found = {mode: train(rank, mode) for mode in MODES}
    for policy, depth in HELD:
        # The smaller one: at times torch still has a block's weights in one place at the count.
        found[policy, depth] = min(held_by(policy, depth) for _ in range(2))
    found |= saved_and_resumed(rank, folder)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def train(rank: int, mode: str) -> dict[str, Any]:
    options, accumulate = MODES[mode]
    model, optimizer = build(mode)
    if "fsdp" in mode:
        optimizer = sharded(model)
    ddp = (
        model
        if "fsdp" in mode
        else create_ddp_model(
            model, device_ids=None, gradient_as_bucket_view=True, broadcast_buffers=False, **options
        )
    )
    reduced: list[int] = []  # how many iterations were over, at each reduction
    steps: list[dict[str, Tensor]] = []

    # No annotations, which DistributedDataParallel would check.
    def reduce(_state, bucket):
        reduced.append(len(steps))
        return allreduce_hook(None, bucket)

    if ddp is not model:
        ddp.register_comm_hook(None, reduce)
    mine = range(rank, WORLD * accumulate, WORLD)
    loader = (batch(iteration, index) for iteration in count() for index in mine)
    trainer = Trainer(ddp, loader, optimizer, seed=SEED, accumulate=accumulate)
    trainer.register_hooks([CallbackHook(after_step=lambda _: steps.append(snapshot(model)))])
    trainer.train(0, STEPS)
    return {"steps": steps, "reduced": reduced}


def sharded(model: nn.Module) -> torch.optim.Optimizer:
    shard(model, blocks_of(model.backbone.net).values(), init_device_mesh("cpu", (WORLD,)))
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


def saved_and_resumed(rank: int, folder: str) -> dict[str, Any]:
    """Where four iterations end, each saved, and where a run ends that resumes from the third."""

    def run_of(start: int) -> tuple[nn.Module, Trainer, Checkpointer]:
        model, _ = build("fsdp")
        loader = (batch(iteration, rank) for iteration in count(start))
        trainer = Trainer(model, loader, sharded(model), seed=SEED)
        return model, trainer, Checkpointer(model, folder, trainer=trainer)

    saved, trainer, checkpointer = run_of(0)
    trainer.register_hooks([Saving(checkpointer, 1, max_to_keep=2, facts={}, metrics=None)])
    trainer.train(0, 4)
    resumed, trainer, checkpointer = run_of(3)
    checkpointer.load(f"{folder}/model_0000002.dcp")
    trainer.train(trainer.iter + 1, 4)
    return {"saved": snapshot(saved), "resumed": snapshot(resumed), "folder": folder}


def held_by(policy: str, depth: int) -> int:
    """Bytes that a sharded trunk holds between forward and backward, beside those of its weights.

    Of all tensors: those that Python knows, and those that only the graph does.
    """

    def alive(*of_the_graph: Tensor) -> int:
        gc.collect()
        known = [o for o in gc.get_objects() if issubclass(type(o), Tensor) and not is_sharded(o)]
        storages = [tensor.untyped_storage() for tensor in (*known, *of_the_graph)]
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())

    size = {"embed_dim": 48, "num_heads": 3, "img_size": SIDE, "depth": depth}
    model = backbones.create_model("rev_vit_small", **size)
    backbones.set_memory(model, policy)
    shard(model, blocks_of(model).values(), init_device_mesh("cpu", (WORLD,)))
    images = torch.randn(8, 3, SIDE, SIDE)
    model(images).sum().backward()
    model.zero_grad()
    before, graph = alive(), []
    with saved_tensors_hooks(lambda tensor: graph.append(tensor) or tensor, lambda tensor: tensor):
        loss = model(images).sum()
    after = alive(*graph)
    loss.backward()
    return after - before


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the processes got. They are started once for all modes."""
    folder = tmp_path_factory.mktemp("ddp")
    forked.start_processes(run, (str(folder),), nprocs=WORLD)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(WORLD)]


def one_process(mode: str) -> list[dict[str, Tensor]]:
    """The parameters after each step, by a loop that knows nothing of the Trainer."""
    model, optimizer = build(mode)
    batches = WORLD * MODES[mode][1]
    steps = []
    with EventStorage():
        for iteration in range(STEPS):
            optimizer.zero_grad()
            for index in range(batches):
                seed_all_rng(seed_of(SEED, iteration, index))
                losses = model(batch(iteration, index))
                (sum(losses.values()) / batches).backward()
            optimizer.step()
            steps.append(snapshot(model))
    return steps


@pytest.mark.parametrize("mode", MODES)
def test_parameters_are_those_of_one_process(results, mode):
    expected = one_process(mode)
    untrained = snapshot(build(mode)[0])
    for rank in range(WORLD):
        steps = results[rank][mode]["steps"]
        assert len(steps) == STEPS
        for got, wanted in zip(steps, expected, strict=True):
            assert got.keys() == wanted.keys()
            for name in wanted:
                error = (got[name] - wanted[name]).norm()
                assert error <= 1e-5 * wanted[name].norm(), name
    still = [name for name in untrained if torch.equal(untrained[name], expected[-1][name])]
    assert len(still) <= 2 and all(name.startswith("unused") for name in still)


def test_a_sharded_reversed_trunk_holds_the_same_at_any_depth(results):
    held = {key: results[0][key] for key in HELD}
    assert held["reversible", 16] == pytest.approx(held["reversible", 4], rel=0.05)
    assert held["store", 16] > 2 * held["store", 4] > 2 * held["reversible", 4]


def test_sharded_checkpoints(results, tmp_path):
    saved, resumed, folder = (results[0][key] for key in ("saved", "resumed", "folder"))
    assert all(torch.equal(saved[name], resumed[name]) for name in saved)
    kept = periodic_checkpoints(Path(folder))
    assert [path.name for path in kept] == ["model_0000002.dcp", "model_0000003.dcp"]

    states = []
    for name in ("model_0000003.dcp", "model_final.pth"):  # in one process
        model, optimizer = build("")
        trainer = Trainer(model, [], optimizer)
        Checkpointer(model, folder, trainer=trainer).load(f"{folder}/{name}")
        assert trainer.iter == 3
        assert all(torch.equal(saved[key], value) for key, value in model.state_dict().items())
        states.append(optimizer.state_dict()["state"])
    momenta = [[entry["momentum_buffer"] for entry in state.values()] for state in states]
    assert len(momenta[0]) == len(saved) and all(map(torch.equal, *momenta))

    run = shutil.copytree(folder, tmp_path / "run")
    (run / "model_final.pth").unlink()
    (run / "last_checkpoint").write_text("model_0000003.dcp")
    assert checkpoint_to_resume(run) == run / "model_0000003.dcp"
    with (run / "model_0000003.dcp" / "__1_0.distcp").open("r+b") as file:
        file.seek(5000)
        file.write(b"another content")
    assert checkpoint_to_resume(run) == run / "model_0000002.dcp"
    with pytest.raises(UserError, match="goes on"):
        load_initial_weights(model, str(run / "model_0000002.dcp"))
    (run / "model_0000002.dcp" / ".metadata").write_bytes(pickle.dumps(Path.touch))
    with pytest.raises(UserError, match=r"model_0000002.dcp is damaged \(it names "):
        Checkpointer(model).load(str(run / "model_0000002.dcp"))


@pytest.mark.parametrize("mode", ["accumulate", "static_graph, accumulate"])
def test_accumulated_gradients_are_reduced_once(results, mode):
    alone = mode.replace("accumulate", "").strip(", ") or "plain"
    # In the first iterations DistributedDataParallel finds out about graph and buckets.
    got, wanted = (
        [results[0][m]["reduced"].count(step) for step in range(2, STEPS)] for m in (mode, alone)
    )
    assert got == wanted and min(got) > 0
