"""Action masks: which actions an environment allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import Space, spaces

from .batches import as_numpy

MASK = "action_mask"  # the key of a mask in observations and in infos
_GIVEN = f"_{MASK}"  # gymnasium's key of which environments gave one


def flat_mask(mask: Any, choices: int | None = None) -> np.ndarray:
    """Return the mask of one environment, which may be in a part for each component, as one row.

    A ValueError names what is no mask, or has another number of entries than ``choices``.
    """
    mask = as_numpy(mask)
    try:
        row = np.ravel(mask if isinstance(mask, np.ndarray) else np.hstack(mask))
    except (TypeError, ValueError):
        row = None
    if row is None or row.dtype.kind not in "biuf" or choices not in (None, row.size):
        expected = "an array of numbers" if choices is None else f"{choices} numbers"
        raise ValueError(
            f"an action mask must be {expected}, one for each action (of each component in turn),"
            f" got {mask!r:.200}"
        )
    return row


def mask_of_each(infos: Mapping[str, Any], n: int) -> list[Any]:
    """Return the mask that each of ``n`` environments gave in its infos, or None."""
    given, there = as_numpy(infos.get(MASK)), infos.get(_GIVEN)
    if given is None:
        return [None] * n
    if len(given) != n:
        raise ValueError(f"infos[{MASK!r}] must hold {n} masks, one per environment, got {given!r}")
    return [mask if there is None or there[i] else None for i, mask in enumerate(given)]


def whole_masks(infos: Mapping[str, Any], ended: np.ndarray, choices: int) -> np.ndarray:
    """Return the masks of all environments, ``(N, choices)``.

    Where an episode ended, bool ``(N,)``, no action will be chosen: all are allowed there, and the
    environment need not give a mask. A ValueError names one that is missing elsewhere.
    """
    n, given, there = len(ended), as_numpy(infos.get(MASK)), infos.get(_GIVEN)
    stacked = isinstance(given, np.ndarray) and given.dtype != object
    if stacked and given.size == n * choices and (there is None or np.all(there)):
        masks = given.reshape(n, choices).copy()
    else:
        masks = np.ones((n, choices), given.dtype if stacked else np.float32)
        each = mask_of_each(infos, n)
        for i in np.flatnonzero(~ended):
            if each[i] is None:
                raise ValueError(
                    f"environment {i} gave no infos[{MASK!r}] where an action is to be chosen: give"
                    " one at every reset, and at every step that does not end the episode (predict"
                    " takes action_masks=)"
                )
            masks[i] = flat_mask(each[i], choices)
    masks[ended] = 1
    return masks


def with_masks(infos: dict[str, Any], masks: Any) -> dict[str, Any]:
    """Return infos with other masks, which all environments gave."""
    return infos | {MASK: masks, _GIVEN: np.ones(len(masks), np.bool_)}


def forbidden_rows(masks: np.ndarray, action_space: Space[Any]) -> np.ndarray:
    """Return where masks ``(..., choices)`` allow nothing, as bool ``(..., components)``.

    Zero forbids an action. Only a MultiDiscrete space has several components.
    """
    allowed = masks != 0
    if isinstance(action_space, spaces.MultiDiscrete):
        counts = action_space.nvec.ravel()
        if counts.sum() == allowed.shape[-1]:
            return ~np.logical_or.reduceat(allowed, np.cumsum(counts) - counts, axis=-1)
    return ~allowed.any(-1, keepdims=True)
