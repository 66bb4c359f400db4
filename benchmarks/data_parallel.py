"""Time a step of one process on all states, and of two processes on half of them each.

Each process has one thread. The two ways take turns: three steps of a TRPO policy from the same
weights, alone, then together. Both must end at the same loss for the same work. The clock of the
processor stops while a process waits for the other one, or for its core. Run
``python -m benchmarks.data_parallel``; it takes half a minute, and wants two cores to itself.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.allocator import keep_freed_memory
from benchmarks.problem import ACTIONS, CG_ITERATIONS, DAMPING, DELTA, OBSERVATIONS, Policy, Problem
from trustregion import NaturalTrustRegion

STEPS, WARMUP, SIZE = 3, 2, 2


def draw(states: int) -> Problem:
    """Return a policy and as many states; actions are better the larger their first part is."""
    torch.manual_seed(0)
    policy, observations = Policy(), torch.randn(states, OBSERVATIONS)
    with torch.no_grad():
        distribution = policy(observations)
        actions = distribution.sample()
        advantages = actions[:, 0] + torch.randn(states)
        advantages = (advantages - advantages.mean()) / advantages.std()
        old = distribution.log_prob(actions)
    return Problem(policy, observations, actions, advantages, old, torch.zeros(ACTIONS))


def part(problem: Problem, rank: int) -> Problem:
    """Return the states of one process."""
    tensors = (problem.observations, problem.actions, problem.advantages, problem.old_log_prob)
    mine = (t.chunk(SIZE)[rank].clone() for t in tensors)
    return Problem(problem.policy, *mine, problem.vector)


class Turn(NamedTuple):
    """Milliseconds of a step by the clock and by the processor, and how the last one ended."""

    clock: float
    processor: float
    loss: float
    work: int


def turn(problem: Problem, *, together: bool) -> Turn:
    """Take the steps of a turn."""
    policy = problem.own_policy()
    optimizer = NaturalTrustRegion(
        policy.parameters(),
        DELTA,
        damping=DAMPING,
        cg_max_iter=CG_ITERATIONS,
        maximize=True,
        process_group=None if together else False,
    )

    def closure():
        distribution = policy(problem.observations)
        return problem.surrogate(distribution), distribution

    clock, processor = time.perf_counter(), time.process_time()
    for _ in range(STEPS):
        optimizer.step(closure)
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    info = optimizer.info
    assert info is not None
    each = 1e3 / STEPS
    return Turn(each * clock, each * processor, info.new_loss, info.products + info.evaluations)


def reduction(n: int, calls: int = 200) -> float:
    """Return the microseconds of one reduction of ``n`` numbers."""
    numbers = torch.zeros(n)
    begin = time.perf_counter()
    for _ in range(calls):
        dist.all_reduce(numbers)
    return 1e6 * (time.perf_counter() - begin) / calls


def work(rank: int, store: str, states: int, turns: int) -> None:
    """Take the turns; the first process prints what it measured."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})  # else both are packed on one, at times
    torch.set_num_threads(1)
    keep_freed_memory()
    limit = timedelta(minutes=5)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE, timeout=limit
    )
    problem = draw(states)
    mine, alone, together = part(problem, rank), [], []
    for _ in range(WARMUP + turns):
        dist.barrier()  # the other process sleeps in the next one
        if rank == 0:
            alone.append(turn(problem, together=False))
        dist.barrier()
        together.append(turn(mine, together=True))
    n = sum(p.numel() for p in problem.policy.parameters())
    microseconds = reduction(n + 1)
    if rank == 0:
        report(alone[WARMUP:], together[WARMUP:], microseconds)
    dist.barrier()  # who leaves early ends the other one
    dist.destroy_process_group()


def report(alone: list[Turn], together: list[Turn], microseconds: float) -> None:
    """Print the times, after checking that both ways did the same."""
    for one, two in zip(alone, together, strict=True):
        assert abs(one.loss - two.loss) < 1e-5, (one, two)  # float32
        assert one.work == two.work
    print("| | median ms | least ms | processor, median ms |\n| --- | --- | --- | --- |")
    columns = [
        (median(t.clock for t in turns), min(t.clock for t in turns), processor(turns))
        for turns in (alone, together)
    ]
    for name, row in zip(("one process", "two processes"), columns, strict=True):
        print(f"| {name} | {' | '.join(f'{ms:.1f}' for ms in row)} |")
    ratios = [one.clock / two.clock for one, two in zip(alone, together, strict=True)]
    low, middle, high = quantiles(ratios)
    _, least, work = (a / b for a, b in zip(*columns, strict=True))
    print(f"| times faster | {middle:.2f} ({low:.2f} to {high:.2f}) | {least:.2f} | {work:.2f} |")
    print(f"\nOne reduction of a vector of the policy's size: {microseconds:.0f} microseconds.")


def processor(turns: list[Turn]) -> float:
    """Return the median time of the processor."""
    return median(t.processor for t in turns)


def main() -> None:
    """Start the processes."""
    parser = argparse.ArgumentParser(description="Time steps of one process and of two in turns.")
    parser.add_argument("--states", type=int, default=20_000)
    parser.add_argument("--turns", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (str(Path(folder) / "store"), args.states, args.turns), SIZE)


if __name__ == "__main__":
    main()
