"""Means over the samples of all processes that take one step together."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..operators.base import LinearOperator

if dist.is_available():
    # The first derivative would import this module. Its default arguments keep the default group of
    # that moment alive for ever, along with threads that can make the exit of Python abort.
    import torch.distributed.nn.functional

ProcessGroup = Any  # A build of torch may lack torch.distributed, and with it the class.
T = TypeVar("T")


class Processes:
    """The processes that take one step together, each with samples of its own.

    Every process computes its part of a mean and adds it to one reduction, so all of them take the
    same decisions. A process that fails says so in that reduction, so none waits for one that has
    left the step.

    Args:
        group: The process group, or None for a single process.

    """

    def __init__(self, group: ProcessGroup | None) -> None:
        self._group = group
        self._work: dist.Work | None = None
        self.size = 1 if group is None else dist.get_world_size(group)

    @classmethod
    def of(cls, given: ProcessGroup | bool | None) -> Processes:
        """Return the processes of a group; None means torch's default group, False means none."""
        known = dist.is_available()
        if given is False or (given is None and not (known and dist.is_initialized())):
            return cls(None)
        group: ProcessGroup = dist.group.WORLD if given is None else given
        if known and group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                "this process is not a member of the process_group it was given: pass False to take"
                " steps of its own"
            )
        if not (known and isinstance(group, dist.ProcessGroup)):
            raise TypeError(
                "process_group must be a process group of torch.distributed, None for the default"
                f" one or False for none, got {given!r}"
            )
        return cls(group if dist.get_world_size(group) > 1 else None)

    def mean(self, compute: Callable[[], Tensor], like: Tensor, share: float) -> Tensor:
        """Return the sum over the processes of ``share`` times what each one computes.

        Args:
            compute: Computes the part of this process, a tensor shaped like ``like``.
            like: A vector with the shape, dtype and device of the result.
            share: The number of samples here over the number in all processes.

        """
        if self.size == 1:
            return compute()
        return self._reduced(lambda: share * compute(), like, dist.ReduceOp.SUM)

    def total(self, compute: Callable[[], tuple[T, Tensor]], like: Tensor) -> tuple[T, Tensor]:
        """Compute something here, and return it with a sum over the processes.

        Args:
            compute: Returns the local result and the part of this process in the sum.
            like: A vector with the shape, dtype and device of the sum.

        """
        if self.size == 1:
            return compute()
        local: list[T] = []

        def part() -> Tensor:
            result, addend = compute()
            local.append(result)
            return addend

        total = self._reduced(part, like, dist.ReduceOp.SUM)
        return local[0], total

    def largest(self, compute: Callable[[], Tensor], like: Tensor) -> Tensor:
        """Return the maximum over the processes; a NaN in one of them counts as infinity."""
        if self.size == 1:
            return compute()
        return self._reduced(lambda: compute().nan_to_num(nan=torch.inf), like, dist.ReduceOp.MAX)

    def require_same(self, theta: Tensor, settings: str, state: object = None) -> None:
        """Raise unless parameters, settings and state agree bit for bit in all processes.

        Steps from different parameters would end at different ones, and different settings or
        states would leave processes waiting for each other. Cost: one reduction.

        Args:
            theta: The parameters, shape ``(n,)``.
            settings: The options, in words.
            state: Everything else that decides a step: tensors and numbers in any structure.

        """
        if self.size == 1:
            return
        tensors, words = list[Tensor](), list[str]()
        _collect(state, tensors, words)
        crcs = [zlib.crc32(text.encode()) for text in (settings, " ".join(words))]
        sums = [_checksum(t.to(theta.device)) for t in (theta, *tensors)]
        # The sums of several tensors are summed up with other weights in turn, too.
        kept = sum((s * (2 * i + 3) for i, s in enumerate(sums[1:])), torch.zeros_like(sums[0]))
        here = torch.cat([sums[0], theta.new_tensor(crcs, dtype=torch.int64), kept])
        both = torch.cat([here, -here])
        top, bottom = self.largest(lambda: both, both).chunk(2)
        same_theta, same_settings, *same_state = (top == -bottom).tolist()
        if not same_theta:
            raise ValueError(
                "the parameters differ between the processes of the group: load the same ones in"
                " each, or broadcast them from one, before the first step"
            )
        if not same_settings:
            raise ValueError(
                "the options differ between the processes of the group, and they must take the same"
                f" step: a schedule has to write the same values in each. Here they are {settings}"
            )
        if not all(same_state):
            raise ValueError(
                "the states of the optimizers differ between the processes of the group (the last"
                " solution or the preconditioner): load the same state in each, or start afresh in"
                " each"
            )

    def tell_of_failure(self, like: Tensor) -> None:
        """Fail in a reduction like ``like``, where the other processes wait for this one."""
        if self.size > 1:
            packed = like.new_zeros(like.numel() + 1)
            packed[-1] = 1.0
            self._reduce(packed, dist.ReduceOp.SUM)

    def operator(self, A: LinearOperator, share: float) -> LinearOperator:
        """Return the mean of the operators of all processes; each product costs one reduction."""
        return A if self.size == 1 else _Mean(self, A, share)

    def _reduced(self, compute: Callable[[], Tensor], like: Tensor, op: Any) -> Tensor:
        failure: BaseException | None = None
        packed = like.new_zeros(like.numel() + 1)  # The last entry says that a process failed.
        try:
            packed[:-1] = compute().reshape(-1)
        except BaseException as error:  # It is raised again below.
            failure = error
            packed[-1] = 1.0
        try:
            self._reduce(packed, op)
        finally:
            if failure is not None:  # It says more than that another process is gone.
                raise failure
        if packed[-1].item() > 0:
            raise RuntimeError(
                "another process of the group raised an error in this step and reports it there;"
                " the parameters of this process are as they were before the step"
            )
        return packed[:-1].view(like.shape)

    def _reduce(self, packed: Tensor, op: Any) -> None:
        try:
            work = dist.all_reduce(packed, op, group=self._group, async_op=True)
            if work is not None:
                work.wait()
            # The handle is kept until the next reduction has ended. Dropping the last reference
            # takes Python's lock, and gloo's thread would make the next reduction wait 5 ms for it.
            self._work = work
        except RuntimeError as error:
            raise RuntimeError(
                "a process of the group has ended or cannot be reached, so this step cannot go on;"
                " the parameters are as they were before it. Restart the group from a checkpoint"
                f" (torch said: {error})"
            ) from error


class _Mean(LinearOperator):
    def __init__(self, processes: Processes, A: LinearOperator, share: float) -> None:
        super().__init__(A.shape[0], A.dtype, A.device)
        self._processes, self._A, self._share = processes, A, share

    def mv(self, v: Tensor) -> Tensor:
        return self._processes.mean(lambda: self._A.mv(v), v, self._share)


def _collect(state: object, tensors: list[Tensor], words: list[str]) -> None:
    """Add the tensors of a structure to a list, and everything else to another one."""
    if isinstance(state, Tensor):
        tensors.append(state)
    elif isinstance(state, Mapping):
        for key, part in state.items():
            words.append(str(key))
            _collect(part, tensors, words)
    elif isinstance(state, (list, tuple)):
        for part in state:
            _collect(part, tensors, words)
    else:
        words.append(repr(state))


def _checksum(values: Tensor) -> Tensor:
    """Return a position-weighted sum over all bits, shape ``(1,)``, int64, which wraps around.

    The weights are odd, so changing any one number changes the sum.
    """
    if values.dtype not in (torch.float32, torch.float64):
        values = values.double()  # exact but for integers beyond 2^53
    values = values.detach().reshape(-1).contiguous()
    bits = values.view(torch.int64 if values.dtype == torch.float64 else torch.int32).long()
    weights = torch.arange(1, 2 * len(bits), 2, device=bits.device)
    return (bits * weights).sum().reshape(1)
