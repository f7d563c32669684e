"""What a run that goes on takes from its recipe, and what from its checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backbones.common.files import set_aside

logger = logging.getLogger(__name__)

Groups = Sequence[dict[str, Any]]


def follow_recipe(groups: Groups, recipe: Groups) -> dict[str, tuple[Any, Any]]:
    """Give the groups of parameters of a checkpoint, in place, the settings that the recipe has for
    them; say what differed, in the first group that it does in: what it is now, and what it was.

    An optimizer would take learning rates, weight decay and the rest from the checkpoint, whatever
    the user has set since. What it has gathered about the parameters is in no group, and stays.
    ``recipe`` is of a fresh optimizer; another number of groups is the optimizer's to refuse.
    """
    changes: dict[str, tuple[Any, Any]] = {}
    for theirs, ours in zip(groups, recipe, strict=False):
        own = {key: value for key, value in ours.items() if key not in ("params", "initial_lr")}
        before = {**theirs, "lr": theirs.get("initial_lr", theirs["lr"])}
        for key in own.keys() & before.keys():
            was, now = (tuple(v) if isinstance(v, Sequence) else v for v in (before[key], own[key]))
            if was != now:
                changes.setdefault(key, (now, was))
        theirs.update(own, initial_lr=own["lr"])
    return changes


def earlier_facts(results: Path) -> dict[str, Any]:
    """What ``results.json`` says of the run; nothing without it, or if it is damaged: set aside."""
    try:
        return dict(json.loads(results.read_text()).get("run", {})) if results.is_file() else {}
    except (AttributeError, TypeError, ValueError):
        logger.warning(f"{results} is damaged: it is {set_aside(results)} now")
        return {}
