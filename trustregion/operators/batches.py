"""The mean of the operators of many batches, with the memory of one."""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from .. import recorded
from ..autodiff import out_of_memory
from ..replay import Replay, kept
from ..vector import ParameterVector
from .base import LinearOperator, product
from .halves import halves

T = TypeVar("T")
Batches: TypeAlias = "Iterable[Any] | Callable[[], Iterable[Any]]"


class BatchedOperator(LinearOperator):
    r"""The operator :math:`\sum_b w_b A_b / \sum_b w_b` of shape ``(n, n)`` over batches of data.

    With the numbers of samples as weights, the Fisher matrices of a partition of the data combine
    to the Fisher matrix of all data; so do the GGN of mean losses.

    Each product iterates over the batches once. For each batch it constructs the operator,
    multiplies, and discards the operator. It needs the memory of one batch, and costs a forward
    pass and the construction of an operator per batch and product. :meth:`mm` does so once for all
    columns. The operators of the first batches are kept while they fit in ``cache_bytes``. A kept
    operator is valid at the parameters at which it was constructed, so that a new
    :class:`BatchedOperator` is needed after they change; a product raises if it detects a change.

    The products are summed in float64. The operator of the first batch is also constructed at
    construction. For a subset of the samples, let ``make`` index the batch with :func:`subsample`,
    with a fixed seed.

    Where the memory does not suffice for a product, what is kept is dropped and every batch is cut
    into two halves from then on, with a warning, and the product is computed again. This needs
    batches of tensors with one slice per sample, in a dict, list or tuple if there are several. If
    the halves do not fit either, the error is raised.

    Each batch sees the same numbers from torch's global generators in every product. A model with
    dropout therefore has one mask per batch, and a data set with random augmentation returns the
    same batches. A product leaves the generators as they were.

    Args:
        make: batch -> the operator of the batch, as ``lambda b: FisherOperator(model(b), params)``.
        batches: an iterable that can be iterated over repeatedly, in the same order: a list, a
            DataLoader that does not shuffle, or a function that returns a new iterator per call.
            A DataLoader with a custom sampler is refused unless that is a list of positions.
        size: batch -> its weight, the number of samples. It is needed unless ``make`` returns a
            :class:`FisherOperator`, an :class:`EmpiricalFisherOperator` or a
            :class:`MonteCarloFisherOperator`; the weight of these is their ``total``, the number of
            samples or the sum of their weights.
        cache_bytes: the limit on the memory of the kept operators: the distinct memory that they
            and their graphs refer to, including the batches.

    Attributes:
        total: the sum of the weights; None before the first product.
        cached: the number of operators that are kept.

    Raises:
        TypeError: ``batches`` or the result of ``make`` has a wrong type.
        ValueError: there are no batches, ``batches`` is an iterator for a single pass or a loader
            that shuffles, the size of a batch is zero or unknown, the operators differ in shape or
            dtype, or the sizes differ from those of the first pass.
        RuntimeError: a parameter of a kept operator was modified in place.
        torch.OutOfMemoryError, MemoryError: the memory does not suffice for half a batch, or for
            one that cannot be cut.

    Example:
        >>> from torch.distributions import Normal
        >>> from trustregion import FisherOperator
        >>> w = torch.zeros(1, requires_grad=True)
        >>> batches = [torch.tensor([1.0, 2.0]), torch.tensor([4.0])]
        >>> F = BatchedOperator(lambda x: FisherOperator(Normal(x * w, 1.0), [w]), batches)
        >>> F @ torch.ones(1), F.total
        (tensor([7.]), 3.0)

    """

    def __init__(
        self,
        make: Callable[[Any], LinearOperator],
        batches: Batches,
        *,
        size: Callable[[Any], float] | None = None,
        cache_bytes: int = 0,
    ) -> None:
        _check_batches(batches)
        if not cache_bytes >= 0:
            raise ValueError(f"cache_bytes must be at least 0, got {cache_bytes}")
        self._make, self._batches, self._size = make, batches, size
        self._kept: list[tuple[LinearOperator, float]] = []
        self._versions: dict[int, tuple[Tensor, int]] = {}  # versions of their parameters
        self._room, self._seen, self._full = cache_bytes, set[tuple[str, int]](), cache_bytes == 0
        self._replay, self._halved = Replay(), False
        self.total: float | None = None
        self._weights: list[float] = []
        operator, weight = self._with_less_memory(self._first)
        super().__init__(operator.shape[0], operator.dtype, operator.device)
        self._weights = [weight]

    @property
    def cached(self) -> int:
        """The number of operators that are kept."""
        return len(self._kept)

    def mv(self, v: Tensor) -> Tensor:
        """Return the product of shape ``(n,)``. Cost: one product and one graph for each batch."""
        return self._mean(v, lambda A: product(A, v))

    def mm(self, V: Tensor) -> Tensor:
        """Return the products ``(n, k)``. Cost: one graph and k products for each batch."""
        return self._mean(V, lambda A: A.mm(V))

    def _first(self) -> tuple[LinearOperator, float]:
        first = next(self._pass(), None)
        if first is None:
            raise ValueError("there are no batches: batches is empty")
        return self._operator(*first)

    def _with_less_memory(self, compute: Callable[[], T]) -> T:
        """Compute something, once more with halves of the batches if the memory is too small."""
        try:
            return compute()
        except (RuntimeError, MemoryError) as error:
            if self._halved or not out_of_memory(error):
                raise
            batch = next(self._pass(), None)
            if batch is None or halves(batch[1]) is None:
                raise
            words = str(error) or type(error).__name__
        # Out of the block, which keeps the tensors of the failed product alive.
        warnings.warn(
            f"the memory is too small for a product with a batch ({words}): it is computed again"
            " with halves of the batches, and so are the products to come. Smaller batches avoid"
            " this warning",
            stacklevel=3,
        )
        self._halved = self._full = True
        self._kept, self._versions, self._seen = [], {}, set()
        self._weights, self.total = [], None
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return compute()

    def _mean(self, like: Tensor, times: Callable[[LinearOperator], Tensor]) -> Tensor:
        return self._with_less_memory(lambda: self._pass_mean(like, times))

    def _pass_mean(self, like: Tensor, times: Callable[[LinearOperator], Tensor]) -> Tensor:
        out = torch.zeros_like(like, dtype=torch.float64)
        weights: list[float] = []
        with kept():
            for operator, weight in self._operators():
                out.add_(times(operator), alpha=weight)
                weights.append(weight)
                del operator  # frees its memory for the next one
        known = self._weights if self.total else self._weights + weights[len(self._weights) :]
        if weights != known:
            raise ValueError(
                f"this pass had {len(weights)} batches, of sizes that begin with {weights[:3]}, and"
                f" an earlier one {len(known)} batches, which begin with {known[:3]}. A product"
                " needs the same batches each time: pass a list, a DataLoader that does not"
                " shuffle, or a function that returns a new iterator at each call"
            )
        self._weights, self.total = weights, sum(weights)
        return out.div_(self.total).to(like.dtype)

    def _operators(self) -> Iterator[tuple[LinearOperator, float]]:
        self._check_unmoved()
        yield from list(self._kept)
        if self.total is not None and len(self._kept) == len(self._weights):
            return  # all operators are kept: the data need not be loaded
        start = len(self._kept)
        for i, batch in islice(self._pass(), start, None):
            operator, weight = self._operator(i, batch)
            self._check_fits(operator)
            yield operator, weight
            self._keep(
                i, operator, weight
            )  # after its product, which may allocate memory that counts
            del operator

    def _pass(self) -> Iterator[tuple[int, Any]]:
        """Yield the batches with their numbers; even to iterate, a DataLoader draws a seed."""
        given, nothing = self._batches, object()
        batches = self._replay.run("start", lambda: iter(given() if callable(given) else given))
        for i in count():
            batch = self._replay.run(("load", i), lambda: next(batches, nothing))
            if batch is nothing:
                return
            if not self._halved:
                yield i, batch
                continue
            for part, half in enumerate(halves(batch) or (batch,)):
                yield 2 * i + part, half

    def _operator(self, i: int, batch: Any) -> tuple[LinearOperator, float]:
        with torch.enable_grad():
            operator = self._replay.run(("make", i), lambda: self._make(batch))
        if not isinstance(operator, LinearOperator):
            raise TypeError(
                "make must return a LinearOperator, as in lambda batch: FisherOperator(model(batch)"
                f", params), got {type(operator).__name__}"
            )
        known = getattr(operator, "total", None) if hasattr(operator, "batch_size") else None
        weight = self._size(batch) if self._size else known
        if weight is None:
            raise ValueError(
                f"a {type(operator).__name__} does not say how many samples it is over: pass size=,"
                " a function from a batch to its number of samples, such as lambda b: len(b[0])"
            )
        if not 0 < weight < float("inf"):
            raise ValueError(f"the size of a batch must be positive and finite, got {weight}")
        return operator, float(weight)

    def _check_fits(self, operator: LinearOperator) -> None:
        if (operator.shape, operator.dtype) != (self.shape, self.dtype):
            raise ValueError(
                f"the operators of the batches differ: the first has shape {self.shape} and dtype"
                f" {self.dtype}, another {operator.shape} and {operator.dtype}"
            )

    def _keep(self, i: int, operator: LinearOperator, weight: float) -> None:
        """Keep the operator of batch ``i`` if it fits and all before it are kept."""
        if self._full or i != len(self._kept):
            return
        seen = set(self._seen)
        try:
            size = _memory(operator, seen)
        except recorded.UnreadableNode:  # its memory cannot be counted
            size = math.inf
        if size > self._room:
            self._full = True
            return
        self._room -= int(size)
        self._seen = seen
        self._kept.append((operator, weight))
        vectors = (part for part in _reached(operator) if isinstance(part, ParameterVector))
        for p in (p for vector in vectors for p in vector.params if not p.is_inference()):
            self._versions.setdefault(id(p), (p, p._version))

    def _check_unmoved(self) -> None:
        if any(p._version != version for p, version in self._versions.values()):
            raise RuntimeError(
                f"parameters were changed in place since {self.cached} operators of batches were"
                " kept, which are valid at the old ones: make a new BatchedOperator at the new"
                " parameters, or use cache_bytes=0"
            )


def _check_batches(batches: Batches) -> None:
    if callable(batches):
        one, other = batches(), batches()
        if isinstance(one, DataLoader):
            _check_order(one)
        elif isinstance(one, Iterable) and iter(one) is iter(other):
            raise ValueError(
                "batches returns the same iterator at each call, which is exhausted after one pass:"
                " let it return a new one"
            )
        return
    if not isinstance(batches, Iterable):
        raise TypeError(
            "batches must be iterable, or a function that returns an iterator, got"
            f" {type(batches).__name__}"
        )
    if isinstance(batches, DataLoader):
        _check_order(batches)
    elif iter(batches) is iter(batches):  # an iterator, or an iterable with a single one
        raise ValueError(
            "batches is an iterator, which is exhausted after one pass, and every product needs a"
            " pass: pass a list, a DataLoader, or a function that returns a new iterator"
        )


def _check_order(loader: DataLoader[Any]) -> None:
    """Raise if the order of a loader's data may differ between passes."""
    if isinstance(loader.dataset, IterableDataset):
        return  # it defines the order itself
    order: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    while isinstance(order, BatchSampler):
        order = order.sampler
    if not isinstance(order, (SequentialSampler, list, tuple, range)):
        raise ValueError(
            f"batches is a DataLoader with a {type(order).__name__}, which may shuffle, so that two"
            " products would be of different operators: use shuffle=False, or sampler= with a list"
            " of positions"
        )


def _memory(root: Any, seen: set[tuple[str, int]]) -> int:
    """Return the bytes of tensors that ``root`` refers to and that are not in ``seen`` yet."""
    total = 0
    for part in _reached(root):
        if isinstance(part, Tensor):
            key, size = _storage(part)
            if key not in seen:
                seen.add(key)
                total += size
    return total


def _reached(root: Any) -> Iterator[Any]:
    """Yield ``root`` and all objects that it refers to, each once."""
    todo, alive = [root], []
    visited: set[int] = set()
    while todo:
        part = todo.pop()
        if id(part) in visited:
            continue
        visited.add(id(part))
        alive.append(part)  # the id of a deleted object may be reused
        yield part
        todo += [part.grad_fn] if isinstance(part, Tensor) else _parts(part)


def _storage(t: Tensor) -> tuple[tuple[str, int], int]:
    """Return the identity and the bytes of the memory that a tensor refers to."""
    try:
        storage = t.untyped_storage()
        return (str(t.device), storage.data_ptr()), storage.nbytes()
    except NotImplementedError:  # a tensor wrapped by torch.func
        return ("wrapped", id(t)), t.nbytes


def _parts(part: Any) -> Iterable[Any]:
    """Return the objects that ``part`` refers to: attributes, items, closure or saved tensors."""
    if isinstance(part, (str, bytes, int, float, type, types.ModuleType, torch.nn.Module)):
        return ()
    if isinstance(part, dict):
        return part.values()
    if isinstance(part, (list, tuple, set, frozenset)):
        return part
    if isinstance(part, types.FunctionType):
        return [cell.cell_contents for cell in part.__closure__ or () if cell != types.CellType()]
    if isinstance(part, types.MethodType):
        return (part.__self__, part.__func__)
    if isinstance(part, torch.autograd.graph.Node):
        saved = [recorded.saved(part, name) for name in recorded.saved_names(part)]
        sources = [node for node, _ in recorded.sources(part)]
        return [*saved, *getattr(part, "saved_tensors", ()), *sources]
    slots = [getattr(part, name, None) for name in getattr(type(part), "__slots__", ())]
    return [*getattr(part, "__dict__", {}).values(), *slots]
