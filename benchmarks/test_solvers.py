from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from threadpoolctl import threadpool_limits
from torch import Tensor

pytest.importorskip("sb3_contrib")
pytest.importorskip("torchopt")
pytest.importorskip("linear_operator")

from benchmarks.allocator import keep_freed_memory
from benchmarks.pairs import PAIRS, Pair
from benchmarks.solver_peers import SOLVERS, Ask, Counted
from benchmarks.solvers import TIMED, diagonal
from benchmarks.systems import System, dense

ROUNDS, WARMUP = 30, 3
CONDITION = 10.0
LIMITS = (1, 7, 15)
"""On iterations, for the check of the iterates."""


@pytest.fixture(scope="module", autouse=True)
def checked() -> None:
    keep_freed_memory()
    for dtype in (torch.float32, torch.float64):
        check(dense(100, CONDITION, dtype))  # no timing of things that differ


def check(system: System) -> None:
    """Assert that everybody solves the system, and that what is observed is what is returned."""
    for name, solve in SOLVERS.items():
        answer = solve(Ask(Counted(system.product), system.b, 1e-4, system.limit))
        # minres of scipy asks |r| <= rtol |T|_F |x|: here up to the condition times a few more
        bound = 1e-4 * (10 * CONDITION if name == "scipy minres" else 1.01)
        assert system.residuals(answer.x.unsqueeze(1)).item() < bound, name
        if name != "our multishift_cg":  # shows no iterates
            check_iterates(system, name)


def check_iterates(system: System, name: str) -> None:
    """Assert that the observer sees, bit for bit and at its price, what each limit returns."""
    counted, seen = Counted(system.product), list[tuple[int, Tensor]]()
    SOLVERS[name](
        Ask(
            counted,
            system.b,
            0.0,
            max(LIMITS),
            lambda x: seen.append((counted.calls, x.clone())),
        )
    )
    for limit in LIMITS:
        again = Counted(system.product)
        answer = SOLVERS[name](Ask(again, system.b, 0.0, limit))
        calls, x = seen[limit - 1]
        assert calls == again.calls, name
        assert torch.equal(x, answer.x), name


@pytest.mark.benchmark(group="iterations on a diagonal system")
@pytest.mark.parametrize("name", TIMED)
@pytest.mark.parametrize("n", [1000, 100_000])
def test_iterations(benchmark: BenchmarkFixture, n: int, name: str) -> None:
    system = diagonal(n, torch.float64)
    counted = system.counted()
    ask = Ask(counted, system.b, 0.0, system.iterations)
    SOLVERS[name](ask)
    benchmark.extra_info.update(n=n, iterations=system.iterations, products=counted.calls)
    measure(benchmark, lambda: SOLVERS[name](ask))


@pytest.mark.parametrize("side", ["ours", "peer"])
@pytest.mark.parametrize("name", PAIRS)
def test_pairs(
    benchmark: BenchmarkFixture, pairs: Callable[[str], Pair], name: str, side: str
) -> None:
    pair = pairs(name)
    ours, peer = pair.check()  # no timing of things that differ
    benchmark.group = name
    benchmark.extra_info.update(products=(ours if side == "ours" else peer).products)
    measure(benchmark, pair.ours if side == "ours" else pair.peer)


@pytest.fixture(scope="module")
def pairs() -> Callable[[str], Pair]:
    return functools.cache(lambda name: PAIRS[name]())


def measure(benchmark: BenchmarkFixture, run: Callable[[], object]) -> None:
    """Time a run on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1, "blas"):
        benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=WARMUP)
    torch.set_num_threads(threads)
