"""Time a step of one process on all states, and of two processes on half of them each.

Each process has one thread. The two ways take turns: three steps of a TRPO policy from the same
weights, alone, then together. Both must end at the same loss for the same work. Run
``python -m benchmarks.data_parallel``; it takes about a minute, and wants two cores to itself.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from statistics import median, quantiles

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


def milliseconds(problem: Problem, *, together: bool) -> tuple[float, float, int]:
    """Return the time of a step, and the loss and the work that the last one ended with."""
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

    begin = time.perf_counter()
    for _ in range(STEPS):
        optimizer.step(closure)
    taken = 1e3 * (time.perf_counter() - begin) / STEPS
    info = optimizer.info
    assert info is not None
    return taken, info.new_loss, info.products + info.evaluations


def reduction(n: int, calls: int = 200) -> float:
    """Return the microseconds of one reduction of ``n`` numbers."""
    numbers = torch.zeros(n)
    begin = time.perf_counter()
    for _ in range(calls):
        dist.all_reduce(numbers)
    return 1e6 * (time.perf_counter() - begin) / calls


def work(rank: int, store: str, states: int, turns: int) -> None:
    """Take the turns; the first process prints what it measured."""
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
            alone.append(milliseconds(problem, together=False))
        dist.barrier()
        together.append(milliseconds(mine, together=True))
    n = sum(p.numel() for p in problem.policy.parameters())
    microseconds = reduction(n + 1)
    if rank == 0:
        report(alone[WARMUP:], together[WARMUP:], microseconds)
    dist.destroy_process_group()


def report(
    alone: list[tuple[float, float, int]],
    together: list[tuple[float, float, int]],
    microseconds: float,
) -> None:
    """Print the times, after checking that both ways did the same."""
    for (_, one, spent), (_, several, spent_by_each) in zip(alone, together, strict=True):
        assert abs(one - several) < 1e-5, (one, several)  # float32
        assert spent == spent_by_each
    one, two = ([t for t, _, _ in times] for times in (alone, together))
    low, middle, high = quantiles([a / b for a, b in zip(one, two, strict=True)])
    print("| | median ms | least ms |\n| --- | --- | --- |")
    print(f"| one process | {median(one):.1f} | {min(one):.1f} |")
    print(f"| two processes | {median(two):.1f} | {min(two):.1f} |")
    print(f"| times faster | {middle:.2f} ({low:.2f} to {high:.2f}) | {min(one) / min(two):.2f} |")
    print(f"\nOne reduction of a vector of the policy's size: {microseconds:.0f} microseconds.")


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
