"""The order in which bytes are spent on products that blocks keep: most work saved per byte first.

What a product takes and saves is counted on the shape-only model. Between a block's forward and
backward pass its bytes are alive, and the bytes at each moment of a step in which nothing is kept
are known; so each can be asked for whether it fits without running a step.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from backbones.engine.policies import Keep
from backbones.memory.simulation import Simulation

# In how many steps the bytes grow from nothing kept to everything.
_LEVELS = 64


class _Item(NamedTuple):
    """What a block keeps at once: a linear layer's outputs, or all products."""

    block: int
    layer: str
    size: int
    operations: float

    @property
    def density(self) -> float:
        return self.operations / max(self.size, 1)


def keeps_by_worth(simulation: Simulation) -> list[Keep]:
    """What the blocks may keep, as :func:`backbones.set_memory` takes it: from nothing to all.

    Each saves more work than the one before and takes more bytes at the peak, and is the best that
    can be had for them: layers of all blocks by the operations that they save per byte, those that
    do not fit passed over. Compiled blocks keep nothing.
    """
    keeps: list[Keep] = [()]
    if simulation.is_compiled:
        return keeps
    nothing = simulation.step(simulation.saving_policy)
    edges = sorted({0, *(edge for span in nothing.spans for edge in span)})
    sizes = torch.tensor([size for _, size in nothing.timeline])
    # The highest number of bytes between one edge and the next.
    peaks = torch.stack([part.max() for part in torch.tensor_split(sizes, edges[1:]) if len(part)])
    places = [slice(edges.index(start), edges.index(end)) for start, end in nothing.spans]
    items, saved = _items(simulation), 0.0
    lowest, whole = int(peaks.max()), sum(item.size for item in items)
    for level in range(_LEVELS + 1):
        chosen = _chosen(items, peaks.clone(), places, lowest + whole * level // _LEVELS)
        operations = sum(item.operations for item in chosen)
        if operations > saved:
            saved = operations
            keeps.append(_named(chosen, simulation))
    return keeps


def _chosen(items: Iterable[_Item], peaks: Tensor, places: list[slice], limit: int) -> list[_Item]:
    chosen: list[_Item] = []
    incomplete: set[int] = set()
    for item in items:
        alive = peaks[places[item.block]]
        fits = not len(alive) or int(alive.max()) + item.size <= limit
        if fits and not (item.layer == "products" and item.block in incomplete):
            alive += item.size
            chosen.append(item)
        else:
            incomplete.add(item.block)
    return chosen


def _items(simulation: Simulation) -> list[_Item]:
    """Of all blocks, in the order of their worth; of what is worth the same, the last block's.

    The products of a block come last in it, and are what is left then. What is worth less than
    they are goes with them.
    """
    items: list[_Item] = []
    of_block: dict[int, list[_Item]] = defaultdict(list)
    for item in _worth(simulation):
        of_block[item.block].append(item)
    for block, found in of_block.items():
        rest = _Item(block, "products", 0, 0.0)
        for item in sorted(found, key=lambda item: (item.layer != "", item.density)):
            if not item.layer or item.operations <= 0 or item.density < rest.density:
                size, operations = rest.size + item.size, rest.operations + item.operations
                rest = rest._replace(size=size, operations=operations)
            else:
                items.append(item)
        items += [rest] if rest.operations > 0 else []
    return sorted(items, key=lambda item: (-item.density, -item.block))


def _worth(simulation: Simulation) -> list[_Item]:
    """Each layer and (``""``) the other products of a block, with the operations that it saves.

    They are counted in steps, for all blocks of a kind together, because not all that is kept
    saves its operations: a checkpointed block leaves out what stands behind the last thing that it
    needs, and attention with dropout is always run again.
    """
    policy, names = simulation.saving_policy, simulation.block_names
    nothing = simulation.step(policy).operations
    groups: dict[tuple[bool, str], list[_Item]] = defaultdict(list)
    for (block, layer), (size, operations) in simulation.products.items():
        kind = simulation.invertible[block], layer
        groups[kind].append(_Item(block, layer, size, operations))
    worth: list[_Item] = []
    spared: Counter[bool] = Counter()
    for (invertible, layer), group in sorted(groups.items(), key=lambda pair: not pair[0][1]):
        keep = tuple(f"{names[item.block]}.{layer or 'products'}" for item in group)
        saved = nothing - simulation.step(policy, 0, keep).operations
        saved -= 0 if layer else spared[invertible]
        spared[invertible] += saved
        share = saved / max(sum(item.operations for item in group), 1)
        worth += [item._replace(operations=share * item.operations) for item in group]
    return worth


def _named(items: Iterable[_Item], simulation: Simulation) -> Keep:
    """Layers that all blocks keep by their names, others behind those of their blocks."""
    of_layer: dict[str, list[int]] = defaultdict(list)
    complete = {item.block for item in items if item.layer == "products"}
    for item in items:
        if item.layer == "products" or item.block not in complete:
            of_layer[item.layer].append(item.block)
    holders = Counter(layer for _, layer in simulation.products)
    keep: list[str] = []
    for layer, blocks in of_layer.items():
        everywhere = simulation.blocks if layer == "products" else holders[layer]
        names = [f"{simulation.block_names[block]}.{layer}" for block in sorted(blocks)]
        keep += [layer] if len(blocks) == everywhere else names
    return "products" if keep == ["products"] else tuple(keep)
