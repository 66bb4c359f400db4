"""Observations of any space as flat rows, and what lies where in a row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from typing import Any, Self, TypeAlias

import numpy as np
from gymnasium import Space, spaces

from .batches import leaves
from .masks import MASK, mask_of_each, whole_masks

_Infos: TypeAlias = "Mapping[str, Any] | None"
_Flags: TypeAlias = "np.ndarray | bool"
_SMALLEST_IMAGE = 8  # pixels per side; a smaller array of bytes is a list of numbers


@dataclass(frozen=True)
class Part:
    """Columns of a row that belong together.

    The kind is ``"vector"`` (real numbers, flags, or one-hot choices), ``"image"`` (bytes, of two
    or three dimensions) or ``"mask"`` (1 for an action that is allowed).
    """

    name: str  # path within the space, such as "arm.position"; "" if the space is not composed
    kind: str
    start: int
    shape: tuple[int, ...]

    @property
    def columns(self) -> slice:
        """All columns."""
        return slice(self.start, self.start + math.prod(self.shape))


class ObservationLayout:
    """How observations of a space lie in flat rows.

    A row holds the parts of an observation one after the other: the entries of a Box or a
    MultiBinary, a Discrete or MultiDiscrete one-hot, and the parts of a Dict or Tuple in turn. Rows
    are float32, or bytes where all parts are images. A key ``"action_mask"`` of a Dict is a mask.

    Args:
        space: of one observation; a ValueError names one that has no such form.
        mask: number of actions whose mask comes with an environment's infos; 0 for none.
        origin: float64 ``(width,)``, subtracted from observations before they become float32; None
            for zeros. See :meth:`with_origin`.

    Example:
        >>> space = spaces.Dict(position=spaces.Box(-1, 1, (2,)), gear=spaces.Discrete(3))
        >>> ObservationLayout(space).flat({"position": np.zeros((1, 2)), "gear": np.array([2])})
        array([[0., 0., 0., 0., 1.]], dtype=float32)

    """

    def __init__(self, space: Space[Any], mask: int = 0, origin: np.ndarray | None = None) -> None:
        self.space, self.width = space, 0
        self._leaves: list[tuple[Part, tuple[Any, ...], Any, Any]] = []
        for path, inner in leaves(space):
            part = _part(".".join(map(str, path)), inner, self.width)
            self._leaves.append((part, path, inner, _choices(inner)))
            self.width = part.columns.stop
        if not self.width:
            raise ValueError(f"unsupported observation space {space}: it has no entries")
        self.info_mask = Part(MASK, "mask", self.width, (mask,)) if mask else None
        info_parts = (self.info_mask,) if self.info_mask else ()
        self.parts: tuple[Part, ...] = (*(leaf[0] for leaf in self._leaves), *info_parts)
        self.width += mask
        masks = self.of_kind("mask")
        if len(masks) > 1:
            raise ValueError(f"several action masks, in {space} and in the environment's infos")
        self._mask = masks[0] if masks else None
        images = len(self.of_kind("image")) == len(self.parts)
        self.dtype = np.dtype(np.uint8 if images else np.float32)
        self.origin = None if origin is None else np.asarray(origin, np.float64)
        if self.origin is not None and self.origin.shape != (self.width,):
            raise ValueError(f"origin must have shape {(self.width,)}, got {self.origin.shape}")

    def with_origin(self, observations: Any) -> Self:
        """Return this layout with its origin at the first observation of a batch.

        float32 has seven digits: those of a time in seconds since 1970 end at two minutes. So what
        comes in a wider type is measured from its first value, unless that is not finite.
        """
        wide = np.zeros(self.width, np.bool_)
        for part, _, space, _ in self._leaves:
            wider = isinstance(space, spaces.Box) and not np.can_cast(space.dtype, np.float32)
            wide[part.columns] = wider and part.kind == "vector"
        if not wide.any():
            return self
        rows = np.zeros((self._size(observations), self.width))
        self._fill(observations, rows, None)
        layout = copy(self)
        layout.origin = np.where(wide & np.isfinite(rows[0]), rows[0], 0.0)
        return layout

    def of_kind(self, kind: str) -> tuple[Part, ...]:
        """Return the parts of a kind."""
        return tuple(part for part in self.parts if part.kind == kind)

    @property
    def vector_columns(self) -> list[int]:
        """Columns of the parts that are vectors."""
        return [c for p in self.of_kind("vector") for c in range(p.start, p.columns.stop)]

    def flat(self, observations: Any, infos: _Infos = None, ended: _Flags = False) -> np.ndarray:
        """Return a batch of observations as new rows, ``(N, width)``; see :meth:`write`."""
        rows = np.empty((self._size(observations), self.width), self.dtype)
        self.write(observations, rows, infos, ended)
        return rows

    def write(
        self, observations: Any, rows: np.ndarray, infos: _Infos = None, ended: _Flags = False
    ) -> None:
        """Write a batch of observations, and the masks in its infos, into rows ``(N, width)``.

        Where an episode ended, no action will be chosen: masks are ones there, and may be missing.
        A ValueError names what is missing, misshapen or not in its space.
        """
        self._fill(observations, rows, self.origin)
        infos, n = infos or {}, len(rows)
        unexpected = MASK in infos and self.info_mask is None
        if unexpected and any(mask is not None for mask in mask_of_each(infos, n)):
            raise ValueError(
                f"the environment gave infos[{MASK!r}], and none at its first reset, so nothing"
                " obeys it: give a mask at every reset too, all ones if everything is allowed"
            )
        if self._mask is not None:
            over, columns = np.broadcast_to(ended, n), self._mask.columns
            if self.info_mask is None:
                rows[over, columns] = 1
            else:
                rows[:, columns] = whole_masks(infos, over, self.info_mask.shape[0])

    def _size(self, observations: Any) -> int:
        return len(reduce(getitem, self._leaves[0][1], observations))

    def _fill(self, observations: Any, rows: np.ndarray, origin: np.ndarray | None) -> None:
        for part, path, space, choices in self._leaves:
            values, shape = np.asarray(reduce(getitem, path, observations)), space.shape
            if values.size != len(rows) * math.prod(shape):
                expected = f"{space} must have shape {(len(rows), *shape)}"
                raise ValueError(f"a batch of observations of {expected}, got {values.shape}")
            entries, columns = values.reshape(len(rows), math.prod(shape)), part.columns
            if choices is not None:
                entries = _one_hot(entries, space, *choices)
            elif origin is not None and origin[columns].any():
                entries = entries.astype(np.float64) - origin[columns]
            rows[:, columns] = entries


def _part(name: str, space: Space[Any], start: int) -> Part:
    real = isinstance(space, spaces.Box) and space.dtype.kind in "biuf"
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        shape = (spaces.flatdim(space),)
    elif real or isinstance(space, spaces.MultiBinary):
        shape = space.shape or (1,)
    else:
        raise ValueError(
            f"unsupported observation space {space}{f' at {name!r}' if name else ''}: Box,"
            " Discrete, MultiDiscrete, MultiBinary, and Dict and Tuple of them are supported. Wrap"
            " the environment, for example with gymnasium.wrappers.TransformObservation"
        )
    mask = name.rpartition(".")[2] == MASK
    return Part(name, "mask" if mask else "image" if _is_image(space) else "vector", start, shape)


def _is_image(space: Space[Any]) -> bool:
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8:
        return False
    large = len(space.shape) in (2, 3) and sorted(space.shape)[-2] >= _SMALLEST_IMAGE
    return large and not space.low.any() and bool((space.high == 255).all())  # or it is a board


def _choices(space: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Return how many choices each entry has, and all of them; None if entries are numbers."""
    if not isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return None
    counts = np.ravel(space.n if isinstance(space, spaces.Discrete) else space.nvec)
    firsts = np.ravel(space.start).repeat(counts)
    return counts, firsts + np.concatenate([np.arange(n) for n in counts])


def _one_hot(entries: np.ndarray, space: Any, counts: np.ndarray, choices: Any) -> np.ndarray:
    flags = entries.repeat(counts, 1) == choices
    if np.count_nonzero(flags) != entries.size:
        last = space.start + counts.reshape(space.shape) - 1
        low, high = (x.reshape(space.shape) for x in (entries.min(0), entries.max(0)))
        raise ValueError(
            f"an observation is not in its space: it must be a whole number from {space.start} to"
            f" {last}, and the batch goes from {low} to {high}"
        )
    return flags
