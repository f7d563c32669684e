"""What training, validation and testing do with a batch."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from fvcore.nn import FlopCountAnalysis, flop_count_table
from fvcore.nn.jit_handles import get_shape
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import backbones
from backbones.common.errors import UserError
from backbones.common.resuming import follow_recipe
from backbones.common.seeds import seed_of
from backbones.common.sharding import shard
from backbones.engine.policies import blocks_of
from revvideo.data.mixing import Mixing
from revvideo.data.stills import IMAGES
from revvideo.data.transforms import normalised
from revvideo.data.videos import VideoData
from revvideo.hub import classifier_of
from revvideo.models import AUTOCAST, build_model
from revvideo.settings import Config
from revvideo.training.evaluation import Scores, accuracy, join_scores
from revvideo.training.optim import build_optimizer
from revvideo.training.weights import CLASSES, Weights, load_pretrained, require_complete

logger = logging.getLogger("revvideo")

# So many batches in a row without a video that can be read end a run: the data has gone.
_EMPTY_BATCHES = 50

Batch = dict[str, Any]  # of revvideo.data.clips.collate


class VideoModule(pl.LightningModule):
    """A classifier of clips; a video is tested by the mean of the softmax scores of its views.

    Everything random in a step (mixing, dropout, drop path) is a function of the seed, the step and
    the process, so that a resumed run continues as if it had never stopped.
    """

    backbone: nn.Module  # the network; there once the trainer has started

    def __init__(self, config: Config, weights: Weights | None) -> None:
        super().__init__()
        self.config = config
        self.weights = weights  # to start from or to test; let go once they are in the network
        self._scores: list[Scores] = []
        self.problems: dict[str, str] = {}  # why, of files that this process could not read
        keys = ("memory", "stored_blocks", "memory_keep", "memory_slices")
        self.memory = {key: getattr(config.train, key) for key in keys}  # or what a budget chose
        self._empty = 0  # batches in a row
        self._step_loss = torch.zeros(())  # the sum over the parts of a step so far

    @property
    def data(self) -> VideoData:
        return cast(VideoData, self.trainer.datamodule)  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        """Build the network; Lightning calls this, possibly more than once."""
        if hasattr(self, "backbone"):
            return
        # Here, because what has drawn before depends on the strategy.
        torch.manual_seed(self.config.train.seed)
        model = build_model(self.config, len(self.data.classes))
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        if self.weights is not None:
            report = load_pretrained(model, self.weights)
            self.weights = None
            if not fitting:
                require_complete(report)
            logger.info("%s", report)
        outputs = classifier_of(model).out_features
        _check_labels(self.data, outputs)
        if self.config.train.memory_budget and fitting:
            self._fit_memory(model)
        self._mix = Mixing(self.config.augment, outputs)
        self.backbone = model
        if self.config.train.strategy == "fsdp" and fitting:
            mesh: Any = self.device_mesh
            shard(model, blocks_of(model).values(), mesh["data_parallel"])

    def _fit_memory(self, model: nn.Module) -> None:
        budget, autocast = self.config.train.memory_budget, AUTOCAST[self.config.train.precision]
        clips = self.data.loader_batch_size * self.config.augment.repeats
        example = torch.empty(clips, *self._clip_shape, device="meta")
        model.to(self.trainer.strategy.root_device)
        try:
            plan = backbones.fit_memory(model, example, budget, autocast)
        except ValueError as error:
            raise UserError(f"train.memory_budget={budget}: {error}") from error
        keep = [plan.keep] if isinstance(plan.keep, str) else [*plan.keep]
        chosen = (plan.policy, plan.stored_blocks, keep, plan.slices)
        self.memory = dict(zip(self.memory, chosen, strict=True))
        logger.info("%s", plan)

    def _note(self, problems: list[tuple[str, str]]) -> None:
        for path, reason in problems:
            if path not in self.problems:
                logger.warning("cannot be read any more, left out: %s (%s)", path, reason)
        self.problems.update(problems)

    def forward(self, video: Tensor) -> Tensor:
        """Clips (N, 3, T, H, W) -> logits (N, num_classes)."""
        return cast(Tensor, self.backbone(video))

    def on_fit_start(self) -> None:
        """Log what the network is made of; a sharded one cannot be run by one process."""
        if self.trainer.is_global_zero and self.config.train.strategy != "fsdp":
            table = complexity_table(self.backbone, (1, *self._clip_shape))
            logger.info("multiply-adds of a clip:\n%s", table)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        seed = self.config.train.seed
        torch.manual_seed(seed_of(seed, self.global_step, batch_idx, self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch, zero if it is empty; a UserError if too many in a row are."""
        self._note(batch["problems"])
        video, label, repeats = batch["video"], batch["label"], self.config.augment.repeats
        self._empty = 0 if len(label) else self._empty + 1
        if self._empty >= min(_EMPTY_BATCHES, self.trainer.num_training_batches):
            path, reason = next(reversed(self.problems.items()))
            lost = f"not one video of the last {self._empty} batches can be read any more"
            remedy = f"see that data.root={self.config.data.root} is there, and continue"
            raise UserError(f"{lost}, the last is {path} ({reason}): {remedy} with --resume")
        if empty := len(label) == 0:
            # All processes take part in every step, or the others wait for ever.
            video, label, repeats = self._blank_clip(), label.new_zeros(1), 1
        # Clips are mixed with their neighbours, which would be clips of the same video.
        order = torch.arange(len(label)).view(-1, repeats).T.flatten()
        video = normalised(video, self.config.data, () if empty else batch["erased"])
        video, target = self._mix(video[order], label[order])
        smoothing = self.config.augment.label_smoothing
        loss = F.cross_entropy(self(video), target, label_smoothing=smoothing)
        loss = 0 * loss if empty else loss
        part = batch_idx % self.config.optim.accumulate
        self._step_loss = loss.detach() + (self._step_loss if part else 0)
        shared: dict[str, Any] = {"sync_dist": True, "batch_size": len(label)}
        self.log("train/loss", self._step_loss / (part + 1), prog_bar=True, **shared)
        self.log("train/epoch_loss", loss, on_step=False, on_epoch=True, **shared)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._score(batch, views=1)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._score(batch, views=self.config.test.clips * self.config.test.crops)

    def _score(self, batch: Batch, views: int) -> None:
        self._note(batch["problems"])
        video, label, index = batch["video"], batch["label"], batch["index"]
        # A sharded model gathers its weights in each forward pass, on all processes at once.
        video = normalised(video, self.config.data) if len(label) else self._blank_clip()
        logits = self(video)[: len(label)]
        scores = logits.float().softmax(dim=1).view(-1, views, logits.shape[1]).mean(dim=1)
        self._scores.append((index[::views], label[::views], scores))

    @property
    def _clip_shape(self) -> tuple[int, int, int, int]:
        data = self.config.data
        return 3, data.num_frames, data.crop_size, data.crop_size

    def _blank_clip(self) -> Tensor:
        return torch.zeros(1, *self._clip_shape, device=self.device)

    def on_validation_epoch_end(self) -> None:
        self.on_test_epoch_end()
        for name in ("top1", "top5", "videos"):
            self.log(f"val/{name}", float(getattr(self.accuracy, name)), sync_dist=True)

    def on_test_epoch_end(self) -> None:
        self.predictions = _, label, scores = join_scores(self._scores)
        self._scores.clear()
        what = "images" if self.config.data.layout == IMAGES else "videos"
        self.accuracy = accuracy(label, scores, self.data.val_total, what)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optim, per_epoch = self.config.optim, self.data.steps_per_epoch
        steps, warmup = optim.epochs * per_epoch, round(optim.warmup_epochs * per_epoch)
        total = min(steps, optim.max_steps or steps)
        optimizer, schedule = build_optimizer(
            self.backbone, optim, warmup_steps=warmup, total_steps=total
        )
        self._recipe = [dict(group, lr=group["initial_lr"]) for group in optimizer.param_groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Go on with the settings of the optimizer that the recipe has now."""
        schedule = cast(LambdaLR, self.lr_schedulers())
        groups = schedule.optimizer.param_groups
        follow_recipe(groups, self._recipe)
        schedule.base_lrs = [group["initial_lr"] for group in groups]
        for group, factor in zip(groups, schedule.lr_lambdas, strict=True):
            group["lr"] = group["initial_lr"] * factor(schedule.last_epoch)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **more: Any) -> Any:
        """As torch's; a UserError says that the weights are of another net."""
        try:
            return super().load_state_dict(state_dict, *args, **more)
        except RuntimeError as error:
            first = str(error).partition("\n\t")[2].partition(",")[0].strip()
            wrong = f"the checkpoint is of another architecture ({first})"
            raise UserError(f"{wrong}: resume with the model.… of the run's config.yaml") from error

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CLASSES] = list(self.data.classes)
        checkpoint["config"] = OmegaConf.to_yaml(OmegaConf.structured(self.config))


def complexity_table(model: nn.Module, size: tuple[int, ...]) -> str:
    """Parameters and multiply-adds of a forward pass, of the two uppermost levels of modules.

    Runs the model once in eval mode on one clip, of ``size`` (1, 3, T, H, W), where it is.
    """
    training = model.training
    clip = torch.zeros(size, device=next(model.parameters()).device)
    analysis = FlopCountAnalysis(model.eval(), clip)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch.jit, on being old and on constants
            return cast(str, flop_count_table(analysis, max_depth=2, show_param_shapes=False))
    finally:
        model.train(training)


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """The two products of fused attention, which fvcore does not know."""
    query, key, value = (get_shape(entry) for entry in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _check_labels(data: VideoData, outputs: int) -> None:
    """Labels are outputs of the head by their number: the sets of classes must be the same."""
    count = len(data.classes)
    if count == outputs or (count < outputs and data.config.data.layout == "list"):
        return
    first = ", ".join(data.classes[:3]) + (", …" if count > 3 else "")
    remedy = f"set model.num_classes={count}, complete the data"
    same = "where it is a list whose labels are those of the model, set data.layout=list"
    what = f"the data has {count} classes ({first}), the model {outputs}"
    raise UserError(f"{what}: {remedy}, or, {same}")
