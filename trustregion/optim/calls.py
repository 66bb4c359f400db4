"""What all calls of a closure within one step share: random numbers, buffers and kernels."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeAlias, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy

from ..interrupts import deferred, poll
from ..replay import generator_states, restore_generators
from ..settings import Shared, math_attention

T = TypeVar("T")
Buffers: TypeAlias = "list[tuple[nn.Module, str, Tensor, int, Tensor]]"
"""For each buffer its module, name and tensor, with the tensor's version and values."""

# Torch's global generators and the validation of distributions belong to the process. Steps in
# several threads therefore take turns in calling their closures.
_turn = threading.RLock()


@contextmanager
def _taken_turn() -> Iterator[None]:
    while not _turn.acquire(timeout=0.1):
        poll()  # The closure of another thread may take long.
    try:
        yield
    finally:
        _turn.release()


class Calls:
    """Calls of one closure that all see the same random numbers and the same buffers.

    Dropout draws the same mask in each call, and batch normalization or a spectral norm starts from
    the same statistics, so that a line search compares like with like. After the step, torch's
    generators stand where one call left them, and the buffers where the call at the accepted
    parameters left them; after :meth:`undo` both are as before the step. Only torch's own
    generators are replayed, not numpy's or the closure's.

    Args:
        modules: The modules that earlier steps have called; the first call adds its own.

    """

    def __init__(self, modules: WeakSet[nn.Module] | None = None) -> None:
        self.count, self._new = 0, modules is None
        self.modules = WeakSet[nn.Module]() if modules is None else modules
        self.left: Buffers = []
        self._start: list[Tensor] = []
        self._origin: Buffers = []
        self._end: list[Tensor] | None = None
        self._before: Buffers = []
        self._after: Buffers = []

    def first(self, call: Callable[[], T]) -> T:
        """Make the first call, with a graph, and see what it draws and which buffers it moves."""
        self.count += 1
        found: Buffers = []
        with _taken_turn(), torch.enable_grad(), _discovered(self.modules, found, new=self._new):
            known, self._start = _snapshot(self.modules), generator_states()
            try:
                return call()
            finally:
                end = generator_states()
                self._end = None if all(map(torch.equal, end, self._start)) else end
                # torch.func.functional_call may have lent a module other tensors.
                own = [entry for entry in found if getattr(entry[0], entry[1], None) is entry[2]]
                self._origin = self._before = [e for e in known + own if _has_moved(*e)]
                self._after = self.left = _read(self._before)

    def again(self, call: Callable[[], T], buffers: Buffers | None = None) -> T:
        """Make another call without a graph.

        Torch does not validate the arguments of distributions here: impossible parameters at a
        trial make the loss or the KL refuse it.

        Args:
            call: The call.
            buffers: Where the buffers start from, if not from where they were before the step.

        """
        self.count += 1
        with torch.no_grad(), _taken_turn(), _without_validation():
            return self._replayed(call, buffers)

    def beside(self, call: Callable[[], T]) -> T:
        """Run something else, with a graph, under the same random numbers and buffers."""
        with torch.enable_grad(), _taken_turn():
            return self._replayed(call)

    def first_again(self, call: Callable[[], T]) -> T:
        """Make the first call once more, from where the last call left the buffers."""
        self.count += 1
        with torch.enable_grad(), _taken_turn():
            self._before = self._after = self.left
            result = self._replayed(call)
            self.leave(self.left)
            return result

    def leave(self, buffers: Buffers) -> None:
        """Leave the buffers as the call at the accepted parameters left them."""
        self._after = buffers
        _write(buffers)

    def undo(self) -> None:
        """Put buffers and generators back as they were before the first call."""
        if self._start:
            with _turn:  # Nothing may raise here.
                restore_generators(self._start)
                _write(self._origin)

    def _replayed(self, call: Callable[[], T], buffers: Buffers | None = None) -> T:
        if self._end is not None:
            restore_generators(self._start)
        _write(self._before if buffers is None else buffers)
        try:
            return call()
        finally:
            if self._end is not None:
                restore_generators(self._end)
            self.left = _read(self._before)
            _write(self._after)


@contextmanager
def _discovered(modules: WeakSet[nn.Module], buffers: Buffers, *, new: bool) -> Iterator[None]:
    """Add the modules that this thread calls, and their buffers as they were before the call.

    A compiled module warns that it calls the hook twice. The warning is hidden in the first step of
    an optimizer. In a later one that would show the user's own warnings again, so that nothing is
    added to modules of which one is compiled.
    """
    if not new and any(type(module).__name__ == "OptimizedModule" for module in modules):
        yield
        return
    here = threading.get_ident()

    def collect(module: nn.Module, _: object) -> None:
        if module in modules or threading.get_ident() != here:
            return
        find(module)

    @deferred  # An interrupt must not leave a module known and its buffers not.
    def find(module: nn.Module) -> None:
        # A scripted or exported module runs its parts without calling them.
        parts = [part for part in module.modules() if part not in modules]
        modules.update(parts)
        buffers.extend(_snapshot(parts))

    with ExitStack() as stack:
        if new:
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "Using `torch.compile.* global hooks")
        stack.callback(register_module_forward_pre_hook(collect).remove)
        yield


def _snapshot(modules: Iterable[nn.Module]) -> Buffers:
    named = ((module, name, b) for module in modules for name, b in module.named_buffers("", False))
    # A buffer of a lazy module has no values before the first call.
    return [_entry(module, name, b) for module, name, b in named if not is_lazy(b)]


def _entry(module: nn.Module, name: str, b: Tensor) -> tuple[nn.Module, str, Tensor, int, Tensor]:
    return module, name, b, _version(b), b.detach().clone()


def _version(b: Tensor) -> int:
    return 0 if b.is_inference() else b._version  # An inference tensor does not count its changes.


def _has_moved(module: nn.Module, name: str, old: Tensor, version: int, values: Tensor) -> bool:
    """Say whether a buffer was written to or replaced.

    Its values may stay at a fixed point, and torch's batch normalization does not count its changes
    in the version.
    """
    now = getattr(module, name, old)
    if now is not old or _version(now) != version:
        return True
    return now.layout is torch.strided and not now.is_meta and not torch.equal(now, values)


def _read(buffers: Buffers) -> Buffers:
    """Return the present state of the same buffers, without those that are None now."""
    present = ((module, name, getattr(module, name, None)) for module, name, *_ in buffers)
    return [_entry(module, name, b) for module, name, b in present if b is not None]


@torch.no_grad()
def _write(buffers: Buffers) -> None:
    for module, name, tensor, version, values in buffers:
        if getattr(module, name, None) is not tensor:
            setattr(module, name, tensor)
        # A graph that saved a buffer is invalid once its version has changed. Where the closure's
        # own changes are not counted, as in batch normalization, these are not counted either.
        counted = _version(tensor) != version
        (tensor if counted else tensor.data).copy_(values)


@contextmanager
def _without_validation() -> Iterator[None]:
    default = Distribution._validate_args  # Torch has a setter for it, and no getter.
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(default)


@contextmanager
def _kernels() -> Iterator[None]:
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with math_attention(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


comparable_kernels = Shared(_kernels)
"""Run models on kernels that can be differentiated twice, for the duration of a step.

Attention uses its math kernel, and compiled models run as they were written. The scope is the
whole step: the line search then compares values from one kernel, and activation checkpointing
recomputes in the backward pass what it saw in the forward pass.
"""
