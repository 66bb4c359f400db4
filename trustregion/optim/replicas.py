"""The processes that take one step together, each with samples of its own."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..operators.base import LinearOperator

if dist.is_available():
    # The first derivative would import it. Its default arguments hold the default group of that
    # moment for ever, and with it threads that make the exit of Python abort, at times.
    import torch.distributed.nn.functional

ProcessGroup = Any  # torch.distributed may be absent from a build, and its class with it


class Replicas:
    """Means over the samples of all processes, by which all of them take the same decisions.

    Every process computes its part and adds it to one reduction. What one of them raises, the
    others are told in the same reduction: none waits for one that has left the step.

    Args:
        group: the process group; None for one process.

    """

    def __init__(self, group: ProcessGroup | None) -> None:
        self._group = group
        self._work: dist.Work | None = None
        self.size = 1 if group is None else dist.get_world_size(group)

    @classmethod
    def of(cls, given: ProcessGroup | bool | None) -> Replicas:
        """Return those of a group, of torch's default group for None, or of none for False."""
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
        """Return the sum over the processes of ``share`` times what each computes.

        Args:
            compute: the part of this process, a tensor like ``like``.
            like: a vector of the shape, dtype and device of the result.
            share: the samples here over the samples of all.

        """
        if self.size == 1:
            return compute()
        return self._joined(lambda: share * compute(), like, dist.ReduceOp.SUM)

    def total(self, compute: Callable[[], Tensor], like: Tensor) -> Tensor:
        """Return the sum over the processes."""
        return self.mean(compute, like, 1.0)

    def largest(self, compute: Callable[[], Tensor], like: Tensor) -> Tensor:
        """Return the maximum over the processes; NaN where one of them has a NaN."""
        if self.size == 1:
            return compute()
        return self._joined(lambda: compute().nan_to_num(nan=torch.inf), like, dist.ReduceOp.MAX)

    def require_same(self, theta: Tensor, settings: str) -> None:
        """Raise unless parameters and settings are the same in all processes, bit for bit.

        Cost: one reduction. Steps from different places would end in different ones, and different
        settings in processes that wait for each other.
        """
        if self.size == 1:
            return
        crc = theta.new_tensor([zlib.crc32(settings.encode())], dtype=torch.int64)
        here = torch.cat([_checksum(theta), crc])
        both = torch.cat([here, -here])
        top, bottom = self.largest(lambda: both, both).chunk(2)
        same_theta, same_settings = (top == -bottom).tolist()
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

    def operator(self, A: LinearOperator, share: float) -> LinearOperator:
        """Return the mean of the operators of all processes. Cost: one reduction a product."""
        return A if self.size == 1 else _Mean(self, A, share)

    def _joined(self, compute: Callable[[], Tensor], like: Tensor, op: Any) -> Tensor:
        failure: BaseException | None = None
        packed = like.new_zeros(like.numel() + 1)  # the last one says that a process failed
        try:
            packed[:-1] = compute().reshape(-1)
        except BaseException as error:  # raised again below
            failure = error
            packed[-1] = 1.0
        self._reduce(packed, op)
        if failure is not None:
            raise failure
        if packed[-1].item() > 0:
            raise RuntimeError(
                "another process of the group raised an error in this step, which is printed there;"
                " the parameters of this one are as they were before it"
            )
        return packed[:-1].view(like.shape)

    def _reduce(self, packed: Tensor, op: Any) -> None:
        try:
            work = dist.all_reduce(packed, op, group=self._group, async_op=True)
            if work is not None:
                work.wait()
            # Held until the next one has ended: who drops the last reference needs Python's lock,
            # and gloo's thread, with the next reduction behind it, would wait 5 ms for that.
            self._work = work
        except RuntimeError as error:
            raise RuntimeError(
                "a process of the group has ended or cannot be reached, so this step cannot go on;"
                " the parameters are as they were before it. Restart the group from a checkpoint"
                f" (torch said: {error})"
            ) from error


class _Mean(LinearOperator):
    def __init__(self, replicas: Replicas, A: LinearOperator, share: float) -> None:
        super().__init__(A.shape[0], A.dtype, A.device)
        self._replicas, self._A, self._share = replicas, A, share

    def mv(self, v: Tensor) -> Tensor:
        return self._replicas.mean(lambda: self._A.mv(v), v, self._share)


def _checksum(values: Tensor) -> Tensor:
    """Return a sum over all bits that knows their places, shape ``(1,)``, int64.

    It wraps around. A change of one number always changes it: the weights are odd.
    """
    bits = values.view(torch.int64 if values.dtype == torch.float64 else torch.int32).long()
    weights = torch.arange(1, 2 * len(bits), 2, device=bits.device)
    return (bits * weights).sum().reshape(1)
