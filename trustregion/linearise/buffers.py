"""Where the sweeps write: memory that is shared by results which are not alive at once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from .rules import Place, Step
from .shapes import Transpose


class _Memory:
    """Buffers, and which values live in them. A value may share the buffers of others."""

    def __init__(self) -> None:
        self._free: defaultdict[object, list[Tensor]] = defaultdict(list)
        self._users: Counter[int] = Counter()
        self._buffers: dict[int, Tensor] = {}
        self._of: dict[int, frozenset[int]] = {}
        self._whole: set[int] = set()  # values that fill their buffer, in its layout
        self.given: set[int] = set()  # values that are new tensors, which no one else refers to

    def buffers_of(self, values: Collection[int]) -> frozenset[int]:
        """Return the buffers that the values may share."""
        return frozenset().union(*(self._of.get(v, frozenset()) for v in values))

    def share(self, value: int, buffers: frozenset[int]) -> None:
        """Note that a value lives in these buffers, with what was noted before."""
        before = self._of.get(value, frozenset())
        self._of[value] = before | buffers
        self._users.update(buffers - before)

    def new(self, value: int, place: Place) -> Tensor:
        """Return memory for a value."""
        key = (place.numel, place.dtype, place.device)
        free = self._free[key]
        flat = free.pop() if free else torch.empty(key[0], dtype=key[1], device=key[2])
        self._buffers[id(flat)] = flat
        self.share(value, frozenset({id(flat)}))
        self._whole.add(value)
        return flat.view(place.shape)

    def over(self, source: int, value: int, place: Place) -> Tensor:
        """Return memory for a value, that of ``source`` if nothing else lives there."""
        own = self._of.get(source, frozenset())
        if source in self._whole and len(own) == 1 and self._users[next(iter(own))] == 1:
            flat = self._buffers[next(iter(own))]
            if (flat.numel(), flat.dtype) == (place.numel, place.dtype):
                self.share(value, own)
                self._whole.add(value)
                return flat.view(place.shape)
        return self.new(value, place)

    def keep(self) -> None:
        """Forget which values there are; the buffers that they hold are theirs for ever."""
        self._of.clear()
        self._whole.clear()
        self.given.clear()

    def drop(self, value: int) -> None:
        """Give up a value; its buffers are free when no other value lives there."""
        for buffer in self._of.pop(value, frozenset()):
            self._users[buffer] -= 1
            if self._users[buffer] == 0:
                flat = self._buffers[buffer]
                self._free[flat.numel(), flat.dtype, flat.device].append(flat)
        self._whole.discard(value)


def plan(
    steps: Sequence[Step], results: Mapping[int, Tensor], ends: Collection[int]
) -> frozenset[int]:
    """Give each rule the memory that it writes to.

    Args:
        steps: the program.
        results: the values that are parameters, and where their part of ``J'u`` lies.
        ends: the values that are the outputs.

    Returns:
        The parameters whose part of ``J'u`` a rule writes to its place.

    """
    uses = Counter(value for step in steps for value in step.inputs if value >= 0)
    uses.update(ends)
    memory = _Memory()
    _plan_forward(steps, Counter(uses), memory)
    memory.keep()
    written = _aim(steps, results, uses)
    _plan_backward(steps, uses, memory)
    return written


def _plan_forward(steps: Sequence[Step], uses: Counter[int], memory: _Memory) -> None:
    """Find memory for the tangents; those of the ends are kept."""
    for step in steps:
        rule, inputs, out = step.rule, [i for i in step.inputs if i >= 0], step.outputs.start
        if rule.gives:
            memory.given.add(out)
        elif not rule.buffered:
            shared = frozenset() if rule.fresh else memory.buffers_of(inputs)
            for value in step.outputs:
                if uses[value]:
                    memory.share(value, shared)
        elif rule.elementwise and uses[inputs[0]] == 1 and inputs[0] in memory.given:
            rule.over[0] = True
            memory.given.add(out)
        elif rule.elementwise and uses[inputs[0]] == 1:
            rule.tangent = memory.over(inputs[0], out, rule.site.outputs[0])
        else:
            rule.tangent = memory.new(out, rule.site.outputs[0])
        for value in inputs:
            uses[value] -= 1
            if uses[value] == 0:
                memory.drop(value)


def _aim(
    steps: Sequence[Step], results: Mapping[int, Tensor], uses: Counter[int]
) -> frozenset[int]:
    """Let the cotangent of a parameter, or of the transpose of one, be written to its place."""
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


def _plan_backward(steps: Sequence[Step], uses: Counter[int], memory: _Memory) -> None:
    """Find memory for the cotangents; what is used twice has two, and their sum, a new tensor."""
    for step in reversed(steps):
        rule, out = step.rule, step.outputs.start
        shared = memory.buffers_of(step.outputs)
        for k, value in enumerate(step.inputs):
            place = rule.site.inputs[k]
            if value < 0 or place is None or rule.cotangents[k] is not None:
                continue
            if rule.gives and uses[value] == 1:
                memory.given.add(value)
            elif not rule.writes(k):
                memory.share(value, shared)
            elif rule.elementwise and out in memory.given:
                rule.over[1] = True
                if uses[value] == 1:
                    memory.given.add(value)
            elif rule.elementwise:
                rule.cotangents[k] = memory.over(out, value, place)
            elif rule.buffered:
                rule.cotangents[k] = memory.new(value, place)
        for value in step.outputs:
            memory.drop(value)
