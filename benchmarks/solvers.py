"""The kernels and their peers: products to an accuracy, honesty about it, time beside the product.

Three questions, one table each and dtype, printed as Markdown. The first two are counts and do not
depend on the machine's load; they run in as many processes as there are cores, the timings after
them alone and in turns as in ``report.py``.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import product as pairs
from multiprocessing import get_context
from statistics import median

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from benchmarks.allocator import keep_freed_memory
from benchmarks.report import row
from benchmarks.solver_peers import (
    OURS,
    PEERS,
    SOLVERS,
    Answer,
    Ask,
    Counted,
    linear_operator_defaults,
    our_multishift_cg,
)
from benchmarks.systems import SYSTEMS, System

TARGETS = {
    torch.float32: (1e-2, 1e-4, 1e-6),
    torch.float64: (1e-2, 1e-4, 1e-6, 1e-8, 1e-10),
}
ASKED = 1e-7
"""More than most float32 systems can give."""
SIZES = (10, 1000, 10_000, 100_000)
TIMED = ("our cg", "our minres", *PEERS)


def one_thread() -> None:
    """Leave torch and the BLAS of numpy one thread each."""
    torch.set_num_threads(1)
    threadpool_limits(1, "blas")


class _EnoughError(Exception):
    """Ends a solver from within its observer."""


class _Trace:
    """The products spent when the true residual was first below each target."""

    def __init__(self, system: System, targets: tuple[float, ...]) -> None:
        self.system, self.targets = system, targets
        self.counted = Counted(system.product)
        self.found: list[int] = []
        self.waiting: list[tuple[int, Tensor]] = []
        self.seen = 0

    def observe(self, x: Tensor) -> None:
        self.waiting.append((self.counted.calls, x.clone()))
        # residuals are taken in blocks, whose length is an eighth of the iterations before
        if len(self.waiting) > min(self.seen // 8, 64):
            self.judge()
        if len(self.found) == len(self.targets) or self.counted.calls >= self.system.limit:
            raise _EnoughError

    def judge(self) -> None:
        if self.waiting:
            sizes = self.system.residuals(torch.stack([x for _, x in self.waiting], dim=1))
            for (calls, _), size in zip(self.waiting, sizes.tolist(), strict=True):
                while len(self.found) < len(self.targets) and size < self.targets[len(self.found)]:
                    self.found.append(calls)
        self.seen += len(self.waiting)
        self.waiting = []


def trace(system: System, name: str, targets: tuple[float, ...]) -> list[int]:
    """Return the products that reach the targets, as many of them as were reached."""
    if name == "our multishift_cg":
        return _asked_for(system, targets)
    trace = _Trace(system, targets)
    with suppress(_EnoughError):
        SOLVERS[name](Ask(trace.counted, system.b, 0.0, system.limit, trace.observe))
    trace.judge()
    return trace.found


def _asked_for(system: System, targets: tuple[float, ...]) -> list[int]:
    """Return what is paid for each target where it is asked for: no iterates are shown."""
    found = []
    for target in targets:
        counted = Counted(system.product)
        answer = our_multishift_cg(Ask(counted, system.b, target, system.limit))
        if not residual(system, answer) <= target:
            break
        found.append(counted.calls)
    return found


def residual(system: System, answer: Answer) -> float:
    """Return the true relative residual of an answer."""
    return system.residuals(answer.x.unsqueeze(1)).item()


@dataclass(frozen=True)
class Claim:
    """What came of asking for ``ASKED``."""

    residual: float
    products: int
    converged: bool
    word: str

    @property
    def false(self) -> bool:
        """It says that it converged, and did not."""
        return self.converged and not self.residual <= ASKED

    def __str__(self) -> str:
        word = "**false**" if self.false else "yes" if self.converged else self.word
        return f"{self.residual:.1e} ({self.products}) {word}"


@dataclass(frozen=True)
class Counts:
    """The counts of all solvers on one system."""

    system: str
    products: dict[str, list[int]]
    claims: dict[str, Claim]
    """In float32 only."""
    defaults: Claim | None


@torch.no_grad()
def count(task: tuple[int, torch.dtype]) -> Counts:
    """Run every solver on one system."""
    one_thread()
    index, dtype = task
    with torch.enable_grad():
        system = SYSTEMS[index](dtype)
    products = {name: trace(system, name, TARGETS[dtype]) for name in SOLVERS}
    if dtype is not torch.float32:
        return Counts(system.name, products, {}, None)
    claims = {}
    for name, solve in (SOLVERS | {"defaults": linear_operator_defaults}).items():
        counted = Counted(system.product)
        answer = solve(Ask(counted, system.b, ASKED, system.limit))
        claims[name] = Claim(residual(system, answer), counted.calls, answer.converged, answer.word)
    return Counts(system.name, products, claims, claims.pop("defaults"))


def head(*names: str) -> None:
    """Print the head of a table."""
    print("\n" + row(*names))
    print(row("---", *["---:"] * (len(names) - 1)))


def print_products(dtype: torch.dtype, counts: list[Counts]) -> None:
    """Print the table of the first question, and where ours is behind."""
    wanted = ", ".join(f"{t:.0e}".replace("e-0", "e-") for t in TARGETS[dtype])
    print(f"\nProducts until |b - Ax| / |b| < {wanted}; {str(dtype).removeprefix('torch.')}")
    head("system", *SOLVERS)
    for c in counts:
        cells = [
            " ".join(map(str, [*found, *["-"] * (len(TARGETS[dtype]) - len(found))]))
            for found in c.products.values()
        ]
        print(row(c.system, *cells))
    peers = [name for name in PEERS if name != "scipy minres"]
    print("\n" + "; ".join(_compared("our cg", peers, dtype, counts)))
    print("\n" + "; ".join(_compared("our cg, reorth.", peers, dtype, counts)))
    print("\n" + "; ".join(_compared("our minres", ["scipy minres"], dtype, counts)))


def _compared(
    name: str, peers: list[str], dtype: torch.dtype, counts: list[Counts]
) -> Iterator[str]:
    """Yield how often a solver needs fewer products than the best of its peers, and where more."""
    tally, behind = {"fewer": 0, "as many": 0, "more": 0}, []
    for c, (i, target) in pairs(counts, enumerate(TARGETS[dtype])):
        own, *others = (
            c.products[who][i] if i < len(c.products[who]) else float("inf")
            for who in (name, *peers)
        )
        best = min(others)
        tally["fewer" if own < best else "more" if own > best else "as many"] += 1
        if own > best:
            behind.append(f"{c.system} at {target:.0e}: {own} to {best}")
    yield f"{name} against the best of {', '.join(peers)}: {tally}"
    yield from behind


def print_claims(counts: list[Counts]) -> None:
    """Print the table of the second question."""
    print(f"\nTrue residual when asked for {ASKED:.0e} (products), and whether it says converged")
    head("system", *SOLVERS)
    for c in counts:
        print(row(c.system, *map(str, c.claims.values())))
    for label, bound in (("false claims", ASKED), ("of these above twice that", 2 * ASKED)):
        claims = ([c.claims[name] for c in counts] for name in SOLVERS)
        print(row(label, *(str(sum(c.false and c.residual > bound for c in cs)) for cs in claims)))
    defaults = [c.defaults for c in counts if c.defaults is not None]
    sizes = sorted(d.residual for d in defaults)
    silent = sum(d.converged for d in defaults)
    print(
        f"\nlinear_cg with its defaults: true residuals from {sizes[0]:.1e} to {sizes[-1]:.1e},"
        f" median {median(sizes):.1e}, without a warning on {silent} of {len(sizes)} systems"
    )


@dataclass(frozen=True)
class Diagonal:
    """A system whose product is next to nothing, in the arrays of either library."""

    b: Tensor
    d: Tensor
    iterations: int
    solves: int
    """In a row, for one timing."""

    def counted(self) -> Counted:
        array: np.ndarray = self.d.numpy()
        return Counted(lambda v: self.d * v, lambda v: array * v)


def diagonal(n: int, dtype: torch.dtype) -> Diagonal:
    """Make the system of one row; no solver ends on it by itself."""
    iterations = min(50, n - 2)
    d = torch.logspace(-3, 0, n, dtype=dtype)
    return Diagonal(torch.ones(n, dtype=dtype), d, iterations, min(20, max(1, 5000 // n)))


def seconds(system: Diagonal, name: str) -> float:
    """Return the processor time of an iteration without its product.

    There is one thread: where nothing else runs, it is the time by the clock.
    """
    counted = system.counted()
    arrays = name.startswith("scipy")
    multiply = counted.on_array if arrays else counted
    v = system.b.numpy() if arrays else system.b
    start = time.process_time()
    for _ in range(system.solves):
        SOLVERS[name](Ask(counted, system.b, 0.0, system.iterations))
    middle = time.process_time()
    calls = counted.calls
    for _ in range(calls):
        multiply(v)  # type: ignore[arg-type]  # the one that fits v
    end = time.process_time()
    return ((middle - start) - (end - middle)) / (system.iterations * system.solves)


@torch.no_grad()
def print_overhead(repeats: int) -> None:
    """Print the table of the third question."""
    print("\nMicroseconds an iteration beside the product (peer / ours of the same method)")
    head("diagonal system", *TIMED)
    for dtype, n in pairs(TARGETS, SIZES):
        system = diagonal(n, dtype)
        turns: dict[str, list[float]] = {name: [] for name in TIMED}
        for turn in range(2 + repeats):
            for name in TIMED:
                taken = seconds(system, name)
                if turn >= 2:
                    turns[name].append(taken)
        cells = []
        for name, times in turns.items():
            ours = turns["our minres" if name == "scipy minres" else "our cg"]
            ratio = median(t / o for t, o in zip(times, ours, strict=True))
            cell = f"{1e6 * median(times):.1f}"
            cells.append(cell if name in OURS else f"{cell} ({ratio:.2f})")
        print(row(f"{n}, {str(dtype).removeprefix('torch.')}", *cells))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description="Compare the package's linear solvers with their peers; print Markdown tables."
    )
    parser.add_argument("--repeats", type=int, default=30, help="turns of the timings")
    args = parser.parse_args()
    keep_freed_memory()
    one_thread()
    tasks = [(i, dtype) for dtype in TARGETS for i in range(len(SYSTEMS))]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        counts = list(pool.map(count, tasks))
    by_dtype = {d: [c for (_, e), c in zip(tasks, counts, strict=True) if e is d] for d in TARGETS}
    for dtype, group in by_dtype.items():
        print_products(dtype, group)
    print_claims(by_dtype[torch.float32])
    print_overhead(args.repeats)


if __name__ == "__main__":
    main()
