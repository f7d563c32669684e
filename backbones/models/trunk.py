"""What every model of the package ends with, and what it can be asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn

from backbones.engine.policies import MemoryPolicy, blocks_of, set_memory
from backbones.engine.reversible import ReversibleBlock, ReversibleSequence
from backbones.models.layers import NORM_EPS, ResidualBlock, init_weights

Fuse = Literal["concat", "mean"]


class Trunk(nn.Module):
    """A stem and blocks, which subclasses make; then norm, mean over all tokens, and head.

    Attributes:
        num_classes: outputs of the head; 0 for pooled features.
        clips: whether the input has a time axis.
        feature_info: for each map of :meth:`feature_maps` its channels (``num_chs``) and its
            stride in pixels (``reduction``), finest first, as in timm.
        num_features: channels of the tokens after the final norm.
        num_prefix_tokens: tokens in front of those of the grid.
        streams: 2 in a reversible model, which end side by side; else 1.
        fuse: what becomes of two streams: ``"concat"``, or ``"mean"``.
        global_pool: what the head reads: ``"avg"``, the mean of the grid's tokens, or ``"token"``.
    """

    streams: ClassVar[int] = 1
    num_prefix_tokens = 0
    global_pool: Literal["avg", "token"] = "avg"

    def __init__(self, num_classes: int, clips: bool, fuse: Fuse | None = None) -> None:
        super().__init__()
        if fuse is not None and (self.streams == 1 or fuse not in get_args(Fuse)):
            raise ValueError(
                f"fuse {fuse!r}: a reversible model takes 'concat' or 'mean', one of a single "
                "stream has nothing to fuse"
            )
        self.num_classes = num_classes
        self.clips = clips
        self.fuse = fuse or "concat"

    @property
    def width(self) -> int:
        """How many times as wide as a stream the features are."""
        return 1 if self.fuse == "mean" else self.streams

    def join(self, streams: tuple[Tensor, ...]) -> Tensor:
        """Two streams side by side, or their mean; or the one there is. (…, C) each."""
        if len(streams) == 1:
            return streams[0]
        if self.fuse == "mean":
            return (streams[0] + streams[1]) / 2
        return torch.cat(streams, dim=-1)

    def _stack(self, blocks: Iterable[tuple[Any, ...]]) -> nn.Module:
        """Blocks one after the other, from the arguments of each: f, g, rate of drop path."""
        if self.streams == 1:
            return nn.Sequential(*(ResidualBlock(*block) for block in blocks))
        return ReversibleSequence(ReversibleBlock(*block) for block in blocks)

    def _finish(
        self,
        feature_info: list[dict[str, int]],
        drop_rate: float,
        final_norm: bool = True,
        fc_norm: bool = False,
    ) -> None:
        """Make norm and head behind what is there, and initialise all of it."""
        self.feature_info = feature_info
        self.num_features = feature_info[-1]["num_chs"]
        norms = [
            nn.LayerNorm(self.num_features, eps=NORM_EPS) if wanted else nn.Identity()
            for wanted in (final_norm and not fc_norm, final_norm and fc_norm)
        ]
        self.norm, self.fc_norm = norms
        self.head_drop = nn.Dropout(drop_rate)
        classes = self.num_classes
        self.head = nn.Linear(self.num_features, classes) if classes else nn.Identity()
        self.apply(init_weights)

    def init_weights(self) -> None:
        """Initialise all parameters anew: after ``to_empty()``, for one."""
        for module in self.modules():
            if hasattr(module, "reset_parameters"):
                cast(Any, module).reset_parameters()
        self.apply(init_weights)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Trunk:
        # `to(memory_format=torch.channels_last)` is for kernels of four dimensions.
        def of_any_rank(tensor: Tensor) -> Tensor:
            if tensor.ndim == 5 and tensor.shape[2] == 1:
                return fn(tensor.squeeze(2)).unsqueeze(2)
            try:
                return fn(tensor)
            except RuntimeError as error:
                if tensor.ndim == 5 and "channels_last" in str(error):
                    raise RuntimeError(
                        "channels_last is for images; a model of clips takes "
                        "memory_format=torch.channels_last_3d"
                    ) from error
                raise

        return cast(Trunk, super()._apply(of_any_rank, recurse))

    @abstractmethod
    def _forward_grids(self, x: Tensor, every_stage: bool) -> tuple[list[Tensor], Tensor]:
        """Images or clips -> grids (B, T, H, W, C), those of two streams side by side.

        Of every stage, or of the last only, which goes through the final norm; and all tokens of
        the last one, (B, N, C), with those that are in no grid.
        """

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W), or clips (B, in_chans, T, H, W) -> (B, N, num_features).

        The tokens of the last stage after the final norm, row-major in time, height and width,
        behind those that precede them (``num_prefix_tokens``).
        """
        return self._forward_grids(x, every_stage=False)[1]

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """One map for each stage, finest first; the last one alone goes through the final norm.

        Images (B, in_chans, H, W) give maps (B, C_i, H_i, W_i), with H_i and W_i the input's over
        ``feature_info``'s ``reduction``, rounded up. Clips (B, in_chans, T, H, W) give
        (B, C_i, T', H_i, W_i) with T' half of T, rounded up. Of a reversible model a map is its
        two streams, one behind the other.
        """
        return [*map(self._as_map, self._forward_grids(x, every_stage=True)[0])]

    def _as_map(self, grid: Tensor) -> Tensor:
        """(B, T, H, W, C) -> (B, C, T, H, W), of images (B, C, H, W)."""
        channels_first = grid.permute(0, 4, 1, 2, 3)
        return channels_first if self.clips else channels_first.squeeze(2)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W), or clips (B, in_chans, T, H, W) -> logits (B, num_classes).

        Raw in eval mode too. With ``num_classes=0``: the mean of the tokens, (B, num_features). A
        ValueError if ``x`` has another number of axes or of channels.
        """
        return self.forward_head(self.forward_features(x))

    # What timm asks its models for, by its names; ``backbones.timm`` registers them there.

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Of :meth:`forward_features`, (B, N, num_features) -> logits, or what the head reads."""
        if self.global_pool == "token":
            pooled = tokens[:, 0]
        else:
            pooled = tokens[:, self.num_prefix_tokens :].mean(dim=1)
        pooled = self.head_drop(self.fc_norm(pooled))
        return pooled if pre_logits else cast(Tensor, self.head(pooled))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Iterable[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Tokens of :meth:`forward_features`, and the maps of :meth:`feature_maps` at ``indices``.

        ``indices`` may be how many of the last, or None for all. ``intermediates_only`` leaves the
        tokens away; ``stop_early`` changes nothing; another ``output_fmt``, or ``norm``, is a
        ValueError.
        """
        if output_fmt != "NCHW" or norm:
            given = f"{output_fmt=}, {norm=}"
            raise ValueError(f"{given}: maps are to be had with 'NCHW' and False alone")
        grids, tokens = self._forward_grids(x, every_stage=True)
        wanted = range(-indices, 0) if isinstance(indices, int) else indices
        chosen = grids if wanted is None else [grids[index] for index in wanted]
        maps = [*map(self._as_map, chosen)]
        return maps if intermediates_only else (tokens, maps)

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new head for ``num_classes`` on, none for 0; a ValueError for another
        ``global_pool`` than the model has, which its norms depend on."""
        if global_pool not in (None, self.global_pool):
            own = f"this model's global_pool is {self.global_pool!r}"
            raise ValueError(f"{own}, not {global_pool!r}: give it to create_model")
        self.num_classes = num_classes
        like = next(self.parameters())
        head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        head.apply(init_weights)
        self.head = head.to(like.device, like.dtype).train(self.training)
        if config := vars(self).get("config"):
            config["arguments"]["num_classes"] = num_classes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """The policy that keeps least, ``"reversible"`` or ``"checkpoint"``; else ``"store"``."""
        least: MemoryPolicy = "reversible" if self.streams == 2 else "checkpoint"
        set_memory(self, least if enable else "store")

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """The layer of a parameter, by its name: 0 for the stem, then the blocks, then the rest."""
        depths = layer_depths(self)
        last = max(depths.values())
        return lambda name: last - depths[name]

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay: positions, and tokens before the grid."""
        parts = ("pos_embed.", "prefix.", ".rel_pos_")
        names = (name for name, _ in self.named_parameters())
        return {name for name in names if any(part in name for part in parts)}


def run_blocks(blocks: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """The one stream that comes out of the blocks, or the two, which start as two copies."""
    if isinstance(blocks, ReversibleSequence):
        return cast(tuple[Tensor, Tensor], blocks(x, x))
    return (cast(Tensor, blocks(x)),)


def layer_depths(trunk: nn.Module) -> dict[str, int]:
    """How many layers lie between each parameter of a trunk and its head, by name.

    With ``n`` blocks, counted through all stages and with their transitions: ``n + 1 - i`` for
    block ``i`` from 1 on, ``n + 1`` for the patch and position embeddings, 0 for what follows the
    blocks.
    """
    blocks = [f"{name}." for name in blocks_of(trunk)]
    depths = {start: len(blocks) - index for index, start in enumerate(blocks)}
    depths |= dict.fromkeys(("patch_embed.", "pos_embed.", "prefix."), len(blocks) + 1)
    names = (name for name, _ in trunk.named_parameters())
    return {name: next((depths[s] for s in depths if name.startswith(s)), 0) for name in names}


def layer_decay_factors(trunk: nn.Module, decay: float) -> dict[str, float]:
    """The factor of the learning rate of every parameter of a trunk, by name.

    As in BEiT (arXiv 2106.08254) and ViTDet (arXiv 2203.16527): ``decay`` to the power of its
    :func:`layer_depths`; a ValueError if it is outside (0, 1].
    """
    if not 0 < decay <= 1:
        raise ValueError(f"layer_decay must be in (0, 1], got {decay}")
    return {name: float(decay**depth) for name, depth in layer_depths(trunk).items()}
