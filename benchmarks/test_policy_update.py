from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

pytest.importorskip("sb3_contrib")

from benchmarks.allocator import keep_freed_memory
from benchmarks.cases import GROUPS, Maker, check
from benchmarks.problem import Problem, make_problem

ROUNDS, WARMUP = 100, 10


@pytest.fixture(scope="module")
def problem() -> Problem:
    keep_freed_memory()
    problem = make_problem()
    check(problem)  # no timing of things that differ
    return problem


def cases(group: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        makers = GROUPS[group]
        by_name = pytest.mark.parametrize("make", makers.values(), ids=makers)
        return pytest.mark.benchmark(group=group)(by_name(test))

    return decorate


def measure(benchmark: BenchmarkFixture, problem: Problem, make: Maker) -> None:
    case = make(problem)
    benchmark.extra_info.update(
        n=problem.vector.numel(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        **case.counts,
    )
    benchmark.pedantic(case.run, setup=case.restore, rounds=ROUNDS, warmup_rounds=WARMUP)


@cases("fisher product")
def test_fisher_product(benchmark: BenchmarkFixture, problem: Problem, make: Maker) -> None:
    measure(benchmark, problem, make)


@cases("conjugate gradients")
def test_conjugate_gradients(benchmark: BenchmarkFixture, problem: Problem, make: Maker) -> None:
    measure(benchmark, problem, make)


@cases("policy update")
def test_policy_update(benchmark: BenchmarkFixture, problem: Problem, make: Maker) -> None:
    measure(benchmark, problem, make)
