"""Time one curvature product of each model by everybody in turns, and print Markdown tables.

Before anything is timed, all products must agree with ours to 1e-3. A turn takes each case once:
one call that does not count, then some in a row, as in a solve; JAX, in a process of its own, takes
its turn while the others wait. A ratio is the median over the turns of peer / ours within one turn,
with its quartiles; wide quartiles mean that something else was running. With one thread the clock
is the processor's time, which does not run while another program has the core; with more it is the
time that passes.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from threadpoolctl import threadpool_limits

from benchmarks.allocator import keep_freed_memory
from benchmarks.curvature_models import MODELS, Model, make
from benchmarks.curvature_peers import MAKERS, Maker, check, gradient, ours_backend
from benchmarks.jax_peer import PYTHON, JaxPeer
from benchmarks.report import cells, row

WARMUP, PAUSE = 2, 0.01
BUDGET = 0.03
"""Seconds of products in a row, of which one case's turn is made."""
SET_UP = (
    "ours",
    "ours, backend graph",
    "ours, GGNOperator",
    "kl graph kept",
    "sb3-contrib",
    "BackPACK",
)
"""Who keeps something between products."""
UNIT, ITERATIONS = "one gradient", 10
TARGETS = {
    ("kl graph kept",): 3.0,
    ("kl graph rebuilt",): 5.0,
    ("curvlinops",): 2.5,
    ("JAX, jitted product", "JAX, in a jitted solve"): 1.0,
}
"""How many times as long the peers are to take; of several, the fastest counts."""


@dataclass(frozen=True)
class Case:
    """One way to a product."""

    seconds: Callable[[int], float]
    """Of so many products in a row."""
    setup: Callable[[], float] | None = None
    """Seconds until the first product can be taken, with the forward pass."""


def timed(run: Callable[[], object], calls: int) -> float:
    """Return the seconds of the calls, after one that does not count."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    run()
    start = clock()
    for _ in range(calls):
        run()
    return clock() - start


def torch_case(model: Model, maker: Maker, *, setup: bool) -> Case:
    """Return a case of this process."""
    product = maker(model)
    v = product.domain(model, model.vector())
    return Case(
        lambda calls: timed(lambda: product.run(v), calls),
        (lambda: timed(lambda: maker(model), 1)) if setup else None,
    )


def jax_cases(peer: JaxPeer) -> dict[str, Case]:
    """Return a product alone, and as one of ten in a compiled solve.

    The latter is left out where it takes three times as long: convolutions inside a compiled loop
    do not get XLA's fast code.
    """
    product = Case(lambda calls: peer.seconds("product", calls), lambda: peer.seconds("setup", 1))
    cases = {"JAX, jitted product": product}
    if peer.seconds("solve", 1) / ITERATIONS < 3 * peer.seconds("product", 1):
        cases["JAX, in a jitted solve"] = Case(
            lambda calls: calls / ITERATIONS * peer.seconds("solve", 1)
        )
    return cases


@dataclass(frozen=True)
class Times:
    """Milliseconds turn by turn."""

    product: dict[str, list[float]]
    setup: dict[str, list[float]]


def measure(cases: dict[str, Case], turns: int, calls: int) -> Times:
    """Time all cases in turns."""
    times = Times({name: [] for name in cases}, {name: [] for name in cases})
    for turn in range(WARMUP + turns):
        for name, case in cases.items():
            time.sleep(PAUSE)  # threads of the case before stop spinning
            ms = 1e3 * case.seconds(calls) / calls
            setup = 1e3 * case.setup() if case.setup else None
            if turn >= WARMUP:
                times.product[name].append(ms)
                if setup is not None:
                    times.setup[name].append(setup)
    return times


def time_model(model: Model, threads: int, turns: int) -> Times:
    """Check that all agree, and time them with so many threads."""
    torch.set_num_threads(threads)
    with threadpool_limits(threads, "blas"):
        Fv = check(model)
        cases = {
            who: torch_case(model, maker, setup=who in SET_UP) for who, maker in MAKERS.items()
        }
        backward = gradient(model)
        cases[UNIT] = Case(lambda calls: timed(backward, calls))
        peer = JaxPeer(model, threads) if PYTHON.exists() else None
        if peer is not None:
            assert (peer.product() - Fv).norm() < 1e-3 * Fv.norm(), "JAX"
            cases |= jax_cases(peer)
        calls = max(1, min(10, int(BUDGET / (cases["ours"].seconds(3) / 3))))
        times = measure(cases, turns, calls)
        if peer is not None:
            peer.close()
    return times


def table(columns: dict[int, Times]) -> list[str]:
    """Return the table of a model: a row for each case, two columns for each number of threads."""
    header = ["who"]
    for threads in columns:
        header += [f"ms, {threads} thread{'s' * (threads > 1)}", "peer / ours"]
    first = next(iter(columns.values()))
    header += ["product / gradient", "set-up, ms"]
    lines = [row(*header), row("---", *["---:"] * (len(header) - 1))]
    for who, product in first.product.items():
        timings = [
            cell
            for t in columns.values()
            for cell in (cells(t.product[who], t.product["ours"]) if who in t.product else ["", ""])
        ]
        ratios = [p / u for p, u in zip(product, first.product[UNIT], strict=True)]
        setup = f"{median(first.setup[who]):.1f}" if first.setup[who] else ""
        lines.append(row(who, *timings, f"{median(ratios):.2f}", setup))
    return lines


def summary(name: str, threads: int, times: Times) -> str:
    """Return a row of the last table: how the peers' times stand to ours."""
    ours = times.product["ours"]
    found = []
    for peers, target in TARGETS.items():
        ratios = [
            median(p / o for p, o in zip(times.product[peer], ours, strict=True))
            for peer in peers
            if peer in times.product
        ]
        met = "met" if ratios and min(ratios) >= target else "missed"
        found.append(f"{min(ratios):.2f}, {met}" if ratios else "not measured")
    return row(name, str(threads), *found)


def main() -> None:
    """Print a table for each model, and a last one of the targets."""
    parser = argparse.ArgumentParser(
        description="Time curvature products of the package and its peers; print Markdown tables."
    )
    parser.add_argument("--turns", type=int, default=30, help="turns, after the warm-up")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="PREFIX")
    args = parser.parse_args()
    # torch.jit, which curvlinops and BackPACK import, warns that it is old
    warnings.filterwarnings("ignore", category=DeprecationWarning)

    keep_freed_memory()
    print(f"torch {torch.__version__}, {args.turns} turns")
    if not PYTHON.exists():
        print("no JAX here: `make .venv-jax/.ready` installs it")
    targets = []
    for name, build in MODELS.items():
        if not name.startswith(tuple(args.models)):
            continue
        model = make(build)
        print(f"\n### {name}\n\nn = {model.vector().numel():,};", end=" ")
        print(f"our backend: {ours_backend(model)}\n")
        columns = {threads: time_model(model, threads, args.turns) for threads in args.threads}
        print("\n".join(table(columns)), flush=True)
        targets += [summary(name, threads, times) for threads, times in columns.items()]
    print("\n### Targets: the peer's time over ours\n")
    goals = [f"{' / '.join(peers)} >= {target:g}" for peers, target in TARGETS.items()]
    print(row("model", "threads", *goals))
    print(row("---", *["---:"] * (1 + len(goals))))
    print("\n".join(targets))


if __name__ == "__main__":
    main()
