"""Run the checks of the contract of torch.optim on ours and on other optimizers with a closure.

Run ``make contract``. Each check runs in a process of its own with a time limit, so that none sees
what another left behind. Optimizers whose packages are not installed have a line instead of a
column.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import platform
import queue
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import trustregion
from tests.contract import CHECKS, OURS, NotApplicable, Subject
from tests.contract.problem import Evaluate, params_of

MINE = ["NaturalTrustRegion", "NewtonTrustRegion"]
FIRST_BEYOND = 31  # the checks before it follow torch's own suite


class Peer(NamedTuple):
    """An optimizer of another package."""

    package: str
    """The distribution's name on PyPI."""
    module: str
    load: Callable[[], Subject]
    excused: dict[int, str]
    """Checks that ask for what it does not claim, with the reason."""


# -- closures as each of them wants it


def _backward(optimizer: torch.optim.Optimizer, evaluate: Evaluate) -> Callable[[], torch.Tensor]:
    frozen = not any(p.requires_grad for p in params_of(optimizer))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss, _ = evaluate()
        if not frozen:
            loss.backward()
        return loss

    return closure


def _no_backward(optimizer: torch.optim.Optimizer, evaluate: Evaluate) -> Callable[[], Any]:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        return evaluate()[0]

    return closure


def _asked_backward(optimizer: torch.optim.Optimizer, evaluate: Evaluate) -> Callable[..., Any]:
    frozen = not any(p.requires_grad for p in params_of(optimizer))

    def closure(backward: bool = True) -> torch.Tensor:
        loss, _ = evaluate()
        if backward and not frozen:
            optimizer.zero_grad()
            loss.backward()
        return loss

    return closure


# -- the peers

NONE_LATER = {12: "no option of it came later than the others"}
RATES: list[dict[str, Any]] = [{"lr": 0.5}, {"lr": torch.tensor(0.5)}]


def _lbfgs(params: Any, **options: Any) -> torch.optim.Optimizer:
    # a history of ten: its own choice of a hundred is two hundred vectors, by design
    given = {"line_search_fn": "strong_wolfe", "history_size": 10, **options}
    return torch.optim.LBFGS(params, **given)


def _torchmin() -> Subject:
    minimizer = importlib.import_module("torchmin").Minimizer

    def make(params: Any, **options: Any) -> torch.optim.Optimizer:
        if "lr" in options:
            raise NotApplicable("it has no lr")
        return minimizer(params, method="trust-ncg", **options)

    return Subject(make, _no_backward)


def _torchzero() -> Subject:
    tz: Any = importlib.import_module("torchzero")

    def make(params: Any, **options: Any) -> torch.optim.Optimizer:
        rate = tz.m.LR(options.pop("lr", 1.0))
        return tz.Optimizer(params, tz.m.NewtonCGSteihaug(), rate, **options)

    return Subject(make, _asked_backward, RATES)


PEERS = {
    "LBFGS": Peer(
        "torch",
        "torch",
        lambda: Subject(_lbfgs, _backward, [*RATES, {"tolerance_grad": 1e-6}]),
        NONE_LATER,
    ),
    "torchmin": Peer("pytorch-minimize", "torchmin", _torchmin, NONE_LATER),
    "torchzero": Peer("torchzero", "torchzero", _torchzero, NONE_LATER),
}


def subject_of(name: str) -> Subject:
    return OURS[name] if name in OURS else PEERS[name].load()


# -- running them


def _examine(name: str, number: int, results: Any) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # the checks that are about warnings say so themselves
    try:
        CHECKS[number](subject_of(name))
    except NotApplicable as reason:
        results.put(("n/a", str(reason)))
    except BaseException as error:
        kind = "" if type(error) is AssertionError else f"{type(error).__name__}: "
        results.put(("**fail**", f"{kind}{str(error) or 'the comparison does not hold'}"))
    else:
        results.put(("pass", ""))


def examine(name: str, number: int, limit: float) -> tuple[str, str]:
    """Run one check in a process of its own; return its outcome and the reason."""
    peer = PEERS.get(name)
    if peer is not None and number in peer.excused:
        return "n/a", peer.excused[number]
    # a server that has imported torch once, from which every check is forked afresh
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.contract"])
    results = context.Queue()
    process = context.Process(target=_examine, args=(name, number, results))
    process.start()
    try:
        return results.get(timeout=limit)
    except queue.Empty:
        return "**fail**", f"no end within {limit:.0f} s"
    finally:
        process.kill()
        process.join()


# -- printing


def shortened(text: str, width: int = 110) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[:width].rsplit(" ", 1)[0] + " ..."


def row(*values: object) -> str:
    return f"| {' | '.join(map(str, values))} |"


def missing(name: str) -> bool:
    try:
        importlib.import_module(PEERS[name].module)
    except ImportError:
        return True
    return False


def print_table(outcomes: dict[tuple[int, str], tuple[str, str]], names: list[str]) -> None:
    """Print a row for each check, and the counts."""
    numbers = sorted({number for number, _ in outcomes})
    print(f"\n{row('', 'check', *names)}\n{row('---:', *['---'] * (len(names) + 1))}")
    for number in numbers:
        title = (CHECKS[number].__doc__ or "").splitlines()[0].rstrip(".")
        print(row(number, title, *(outcomes[number, name][0] for name in names)))
    for title, part in (
        ("**pass / fail, of torch's 30**", [n for n in numbers if n < FIRST_BEYOND]),
        ("**pass / fail, of the other 10**", [n for n in numbers if n >= FIRST_BEYOND]),
    ):
        counts = []
        for name in names:
            found = [outcomes[n, name][0] for n in part]
            counts.append(f"**{found.count('pass')} / {found.count('**fail**')}**")
        print(row("", title, *counts))


def print_reasons(outcomes: dict[tuple[int, str], tuple[str, str]], names: list[str]) -> None:
    """Print a line for each outcome that is not a pass."""
    for name in names:
        reasons = [(n, *found) for (n, of), found in outcomes.items() if of == name and found[1]]
        if reasons:
            print(f"\n{name}:\n")
        for number, outcome, reason in reasons:
            print(f"- {number}, {outcome.strip('*')}: `{shortened(reason)}`")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for a check")
    parser.add_argument("--only", type=int, nargs="*", choices=CHECKS, help="some of the checks")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    absent = [name for name in PEERS if missing(name)]
    names = [*MINE, *(name for name in PEERS if name not in absent)]

    start = time.perf_counter()
    jobs = [(number, name) for number in args.only or CHECKS for name in names]
    outcomes = {
        (number, name): examine(name, number, args.limit)
        for number, name in tqdm(jobs, disable=args.quiet)
    }
    packages = sorted({PEERS[name].package for name in PEERS if name not in absent})
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    print(
        f"Python {platform.python_version()}, torch-trustregion {trustregion.__version__},"
        f" {versions}; {len(jobs)} runs in {time.perf_counter() - start:.0f} s"
    )
    for name in absent:
        print(f"not installed, so not run: {PEERS[name].package}, for {name}")
    print_table(outcomes, names)
    print_reasons(outcomes, names)


if __name__ == "__main__":
    main()
