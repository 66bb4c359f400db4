"""Memory planning: results that are not alive at the same time share buffers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ..recorded import Place
from .rules import Step
from .shapes import Transpose


class _Memory:
    """The memory of each value: a kept buffer, or a tensor that is new in each sweep.

    Several values may share one piece of memory.
    """

    def __init__(self) -> None:
        self._free: defaultdict[object, list[Tensor]] = defaultdict(list)
        self._users: Counter[int] = Counter()
        self._buffers: dict[
            int, Tensor | None
        ] = {}  # None stands for a tensor that is new in each sweep.
        self._of: dict[int, frozenset[int]] = {}
        self._whole: set[int] = set()  # values that fill their memory in its own layout

    def homes(self, values: Collection[int]) -> frozenset[int]:
        """Return the memory that the values may occupy."""
        return frozenset().union(*(self._of.get(v, frozenset()) for v in values))

    def share(self, value: int, homes: frozenset[int]) -> None:
        """Record that a value may also occupy this memory."""
        before = self._of.get(value, frozenset())
        self._of[value] = before | homes
        self._users.update(homes - before)

    def new(self, value: int, place: Place) -> Tensor:
        """Return a buffer for a value."""
        key = (place.numel, place.dtype, place.device)
        free = self._free[key]
        flat = free.pop() if free else torch.empty(key[0], dtype=key[1], device=key[2])
        self._settle(value, id(flat), flat)
        return flat.view(place.shape)

    def give(self, value: int) -> None:
        """Record that a value is a new tensor in each sweep."""
        self._settle(value, -1 - len(self._buffers), None)

    def take_over(self, source: int, value: int) -> bool:
        """Let a value overwrite another one if nothing else occupies that memory."""
        own = self._of.get(source, frozenset())
        if source not in self._whole or len(own) != 1 or self._users[next(iter(own))] != 1:
            return False
        self.share(value, own)
        self._whole.add(value)
        return True

    def keep(self) -> None:
        """Forget all values without freeing the buffers that they occupy."""
        self._of.clear()
        self._whole.clear()

    def drop(self, value: int) -> None:
        """Release a value, and its buffers unless another value occupies them."""
        for home in self._of.pop(value, frozenset()):
            self._users[home] -= 1
            flat = self._buffers[home]
            if self._users[home] == 0 and flat is not None:
                self._free[flat.numel(), flat.dtype, flat.device].append(flat)
        self._whole.discard(value)

    def _settle(self, value: int, home: int, flat: Tensor | None) -> None:
        self._buffers[home] = flat
        self.share(value, frozenset({home}))
        self._whole.add(value)


def plan(
    steps: Sequence[Step], results: Mapping[int, Tensor], ends: Collection[int]
) -> frozenset[int]:
    """Assign to each rule the memory that it writes to.

    Args:
        steps: the steps of the forward pass.
        results: the parameters, as numbered values, and their parts of ``J'u``.
        ends: the outputs, as numbered values.

    Returns:
        The parameters whose part of ``J'u`` a rule writes directly.

    """
    uses = Counter(value for step in steps for value in step.inputs if value >= 0)
    uses.update(ends)
    memory = _Memory()
    _plan_forward(steps, Counter(uses), memory)
    memory.keep()
    written = _aim(steps, results, uses)
    _plan_backward(steps, memory)
    return written


def _plan_forward(steps: Sequence[Step], uses: Counter[int], memory: _Memory) -> None:
    """Assign memory to the tangents; those of the outputs are never shared."""
    for step in steps:
        rule, inputs, out = step.rule, [i for i in step.inputs if i >= 0], step.outputs.start
        if rule.gives:
            memory.give(out)
        elif not rule.buffered:
            homes = frozenset() if rule.fresh else memory.homes(inputs)
            for value in step.outputs:
                if uses[value]:
                    memory.share(value, homes)
        elif rule.elementwise and uses[inputs[0]] == 1 and memory.take_over(inputs[0], out):
            rule.over[0] = True
        else:
            rule.tangent = memory.new(out, rule.site.outputs[0])
        for value in inputs:
            uses[value] -= 1
            if uses[value] == 0:
                memory.drop(value)


def _aim(
    steps: Sequence[Step], results: Mapping[int, Tensor], uses: Counter[int]
) -> frozenset[int]:
    """Let rules write cotangents of parameters, or of their transposes, directly into ``J'u``."""
    transposes = {s.outputs.start: s.inputs[0] for s in steps if isinstance(s.rule, Transpose)}
    written: set[int] = set()
    for step in steps:
        for k, value in enumerate(step.inputs):
            source = transposes.get(value, value)
            once = uses[value] == 1 and uses[source] == 1
            if source in results and once and step.rule.writes(k):
                part = results[source]
                step.rule.cotangents[k] = part if source == value else part.t()
                written.add(source)
    return frozenset(written)


def _plan_backward(steps: Sequence[Step], memory: _Memory) -> None:
    """Assign memory to the cotangents. A value that is used twice has two, and a new sum."""
    for step in reversed(steps):
        rule, out = step.rule, step.outputs.start
        homes = memory.homes(step.outputs)
        for k, value in enumerate(step.inputs):
            place = rule.site.inputs[k]
            if value < 0 or place is None or rule.cotangents[k] is not None:
                continue
            if rule.gives:
                memory.give(value)
            elif not rule.writes(k):
                memory.share(value, homes)
            elif rule.elementwise and memory.take_over(out, value):
                rule.over[1] = True
            else:
                rule.cotangents[k] = memory.new(value, place)
        for value in step.outputs:
            memory.drop(value)
