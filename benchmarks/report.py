"""Time the cases in turns, A, B, C, A, B, C, and print how many times slower the peers are.

Turns put a slow moment of the machine on everybody alike, so that the ratios hold where the
milliseconds do not.
"""

from __future__ import annotations

import argparse
import time
import warnings
from statistics import median

import torch

from benchmarks.cases import GROUPS, Case, check
from benchmarks.problem import make_problem


def milliseconds(cases: dict[str, Case], repeats: int) -> dict[str, float]:
    """Return the median time of each case."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats + WARMUP):
        for name, case in cases.items():
            case.restore()
            start = time.perf_counter()
            case.run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(values[WARMUP:]) for name, values in times.items()}


WARMUP = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    # sb3-contrib logs the mean of its critic's losses, and here it trains no critic.
    warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
    warnings.filterwarnings("ignore", "invalid value encountered in scalar divide", RuntimeWarning)

    problem = make_problem()
    check(problem)
    print(f"torch {torch.__version__}, n = {problem.vector.numel()}, {args.repeats} repeats\n")
    columns = [f"{t} thread{'s' * (t > 1)}" for t in args.threads]
    print("| | products | forward passes |", *(f" {c}, ms | ratio |" for c in columns))
    print("| --- | ---: | ---: |" + " ---: | ---: |" * len(columns))
    for group, makers in GROUPS.items():
        measured: list[dict[str, float]] = []
        for threads in args.threads:
            torch.set_num_threads(threads)
            cases = {name: make(problem) for name, make in makers.items()}
            measured.append(milliseconds(cases, args.repeats))
        for name, case in cases.items():
            cells = [f"{ms[name]:.2f} | {ms[name] / ms['ours']:.2f}" for ms in measured]
            counts = [str(case.counts.get(key, "")) for key in ("products", "forwards")]
            print(f"| {group}: {name} |", " | ".join(counts + cells), "|")


if __name__ == "__main__":
    main()
