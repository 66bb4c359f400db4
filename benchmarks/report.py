"""Time the cases in turns, A, B, C, A, B, C, and print how many times slower the peers are.

Turns put a slow moment of the machine on everybody alike, so that the ratios hold where the
milliseconds do not. A ratio is the median over the turns of peer / ours within one turn, with its
quartiles; wide quartiles mean that something else was running.
"""

from __future__ import annotations

import argparse
import time
import warnings
from statistics import median, quantiles

import torch

from benchmarks.allocator import keep_freed_memory
from benchmarks.cases import GROUPS, Case, check
from benchmarks.problem import make_problem

WARMUP = 10
CALLS = {"fisher product": 10}  # in a row: as in a solve, where a product follows another


def milliseconds(cases: dict[str, Case], repeats: int, calls: int) -> dict[str, list[float]]:
    """Return the time of a call of each case, turn by turn."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(WARMUP + repeats):
        for name, case in cases.items():
            case.restore()
            start = time.perf_counter()
            for _ in range(calls):
                case.run()
            times[name].append(1e3 * (time.perf_counter() - start) / calls)
    return {name: values[WARMUP:] for name, values in times.items()}


def cells(peer: list[float], ours: list[float]) -> list[str]:
    """Return the median time of a peer, and its ratio to ours with the quartiles."""
    low, middle, high = quantiles([p / o for p, o in zip(peer, ours, strict=True)])
    ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})" if peer is not ours else "1"
    return [f"{median(peer):.2f}", ratio]


def row(*values: str) -> str:
    """Return one line of a Markdown table."""
    return f"| {' | '.join(values)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description="Time the package and its peers in turns; print a Markdown table."
    )
    parser.add_argument("--repeats", type=int, default=100, help="turns, after the warm-up")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    # sb3-contrib logs the mean of its critic's losses, and here it trains no critic.
    for message in ("Mean of empty slice", "invalid value encountered in scalar divide"):
        warnings.filterwarnings("ignore", message, RuntimeWarning)

    keep_freed_memory()
    problem = make_problem()
    check(problem)
    print(f"torch {torch.__version__}, n = {problem.vector.numel()}, {args.repeats} turns\n")
    header = ["what", "who", "products", "forward passes"]
    for threads in args.threads:
        header += [f"ms, {threads} thread{'s' * (threads > 1)}", "peer / ours"]
    print(row(*header))
    print(row("---", "---", *["---:"] * (len(header) - 2)))
    for group, makers in GROUPS.items():
        cases = {name: make(problem) for name, make in makers.items()}
        columns: list[dict[str, list[float]]] = []
        for threads in args.threads:
            torch.set_num_threads(threads)
            columns.append(milliseconds(cases, args.repeats, CALLS.get(group, 1)))
        for name, case in cases.items():
            timings = [cell for times in columns for cell in cells(times[name], times["ours"])]
            counts = (str(case.counts[key]) for key in ("products", "forwards"))
            print(row(group, name, *counts, *timings))


if __name__ == "__main__":
    main()
