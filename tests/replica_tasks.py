"""What the processes of test_replicas.py do: steps on a part of the samples, and mishaps."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from optimizers import natural, newton
from replica_models import MODELS, network
from trustregion import KFAC, Jacobi, NaturalTrustRegion, Nystrom
from trustregion.operators.gauss_newton import GaussNewtonOperator
from trustregion.preconditioners import Recycled

EVEN, ODD = (50, 50), (1, 99)
FOLLOW = ("delta", "radius", "damping", "penalty")  # options that may follow the steps

Parts = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """Steps of an optimizer.

    Attributes:
        model: a name of ``MODELS``.
        options: The options of the optimizer, which is NewtonTrustRegion if ``newton``.
        parts: samples of each process.
        rates: learning rates of two groups; none for one group.
        curvature: the Fisher matrix is that of the first 40 samples.
        steps: how many.

    """

    model: str = "classes"
    options: dict[str, Any] = field(default_factory=dict)
    newton: bool = False
    parts: Parts = (30, 70)
    rates: tuple[float, ...] = ()
    curvature: bool = False
    steps: int = 4


RULES = {
    "kfac": KFAC,
    "jacobi, exact": lambda _: Jacobi(probes="exact"),
    "jacobi": lambda _: Jacobi(),
    "nystrom": lambda _: Nystrom(4),
    "recycled": lambda _: Recycled(4),
    "fixed": lambda net: torch.linspace(0.5, 2.0, numel(net), dtype=torch.float64).diag(),
}


def numel(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def values(net: nn.Module) -> list[float]:
    return nn.utils.parameters_to_vector(net.parameters()).tolist()


def rows_of(rank: int | None, parts: Parts) -> slice:
    """Return the samples of a process; all of them for None."""
    return slice(None) if rank is None else slice(sum(parts[:rank]), sum(parts[: rank + 1]))


def optimizer_of(case: Case, net: nn.Module) -> Any:
    options = dict(case.options)
    if isinstance(options.get("preconditioner"), str):
        options["preconditioner"] = RULES[options["preconditioner"]](net)
    params: Any = list(net.parameters())
    if case.rates:
        params = [{"params": params[:2], "lr": case.rates[0]}, {"params": params[2:]}]
        params[1]["lr"] = case.rates[1]
    return (newton if case.newton else natural)(params, **options)


def train(rank: int | None, case: Case) -> list[dict[str, Any]]:
    """Take steps; return the parameters, the loss and the account of each."""
    net, closure, part = MODELS[case.model](rows_of(rank, case.parts))
    optimizer = optimizer_of(case, net)
    given = {"curvature": part} if case.curvature else {}
    out = []
    for _ in range(case.steps):
        loss = optimizer.step(closure, **given)
        info = asdict(optimizer.info)
        group = optimizer.param_groups[0]
        options = {name: group[name] for name in FOLLOW if group.get(name) is not None}
        out.append({"theta": values(net), "loss": loss.item(), "info": info, "options": options})
    return out


def reductions(rank: int, case: Case) -> list[tuple[int, int, int]]:
    """Return for each step the reductions, the products and the trials."""
    net, closure, _ = MODELS[case.model](rows_of(rank, case.parts))
    optimizer, count, true = optimizer_of(case, net), [0], dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return true(*args, **kwargs)

    dist.all_reduce, out = counted, []
    try:
        for _ in range(case.steps):
            count[0] = 0
            optimizer.step(closure)
            out.append((count[0], optimizer.info.products, optimizer.info.evaluations - 1))
    finally:
        dist.all_reduce = true
    return out


def resumed(rank: int, case: Case) -> tuple[list[float], list[float]]:
    """Return where four steps lead, and two and two of a new optimizer that loads the state."""
    ends = []
    for stop in (False, True):
        net, closure, _ = MODELS[case.model](rows_of(rank, case.parts))
        optimizer = optimizer_of(case, net)
        for i in range(4):
            if stop and i == 2:
                state = optimizer.state_dict()
                optimizer = optimizer_of(case, net)
                optimizer.load_state_dict(state)
            optimizer.step(closure)
        ends.append(values(net))
    return tuple(ends)  # type: ignore


@dataclass(frozen=True)
class Mishap:
    """What befalls process 1 in a step.

    Attributes:
        how: ``"raise"``, ``"interrupt"``, ``"nan"``, ``"exit"``, ``"late"`` or nothing.
        where: in the ``"closure"``, the ``"backward"`` pass of the gradient, or a ``"product"``.
        call: in which call, from 1; NaNs stay from then on.

    """

    how: str = ""
    where: str = "closure"
    call: int = 1

    def strikes(self, rank: int, where: str, call: int) -> bool:
        stays = self.how == "nan" and call > self.call
        return rank == 1 and where == self.where and (stays or call == self.call)

    def strike(self) -> None:
        """Do it; a NaN is left to the caller."""
        if self.how == "raise":
            raise ValueError("this batch is broken")
        if self.how == "interrupt":
            raise KeyboardInterrupt("Ctrl-C")
        if self.how == "exit":
            os._exit(7)
        if self.how == "late":
            time.sleep(2.5)  # the group waits for 1 s


def suffer(rank: int, case: Case, mishap: Mishap) -> dict[str, Any]:
    """Take a good step, one with a mishap, and return how it ended."""
    net, closure, _ = MODELS[case.model](rows_of(rank, case.parts))
    optimizer, calls = optimizer_of(case, net), Counter[str]()
    optimizer.step(closure)

    def befalls(where: str) -> bool:
        calls[where] += 1
        if not mishap.strikes(rank, where, calls[where]):
            return False
        mishap.strike()
        return mishap.how == "nan"

    def befallen() -> Any:
        returned, broken = closure(), befalls("closure")
        loss, *rest = returned if isinstance(returned, tuple) else (returned,)
        if loss.requires_grad:
            loss.register_hook(lambda g: g * math.nan if befalls("backward") else g)
        loss = loss * math.nan if broken else loss
        return (loss, *rest) if rest else loss

    def product(A: GaussNewtonOperator, v: Tensor) -> Tensor:
        return true_product(A, v) * (math.nan if befalls("product") else 1.0)

    before, kind, words, begin = values(net), "", "", time.monotonic()
    true_product, GaussNewtonOperator.mv = GaussNewtonOperator.mv, product
    try:
        optimizer.step(befallen)
    except BaseException as error:
        kind, words = type(error).__name__, str(error)
    finally:
        GaussNewtonOperator.mv = true_product
    return {
        "kind": kind,
        "words": words,
        "status": optimizer.info.status.name,
        "moved": values(net) != before,
        "theta": values(net),
        "calls": dict(calls),
        "seconds": time.monotonic() - begin,
    }


def stay_away(rank: int, case: Case) -> Any:
    """Process 1 never takes the step."""
    return train(rank, case) if rank == 0 else None


def in_group(rank: int, case: Case, which: str) -> list[dict[str, Any]] | None:
    """Take steps with a process group, or without one."""
    group: Any = {
        "world": lambda: dist.group.WORLD,
        "both": lambda: dist.new_group([0, 1]),
        "first": lambda: dist.new_group([0]),
        "none": lambda: False,
        "true": lambda: True,
    }[which]()
    if which == "none" and rank == 1:
        return None
    return train(rank, Case(**{**vars(case), "options": {**case.options, "process_group": group}}))


def differ(rank: int, case: Case, what: str) -> None:
    """Take a step to which process 1 brings something else."""
    net, closure, _ = MODELS[case.model](rows_of(rank, case.parts))
    optimizer = optimizer_of(case, net)
    if rank == 1 and what == "parameter":
        with torch.no_grad():  # by one bit
            p = next(net.parameters())
            p[0, 0] = torch.nextafter(p[0, 0], p.new_tensor(math.inf))
    elif rank == 1 and what == "constraints":
        given, closure = closure, lambda: (*given()[:2], torch.zeros(1))
    elif rank == 1:
        for group in optimizer.param_groups:
            group[what] *= 0.5
    optimizer.step(closure)


def begin_unfit(rank: int, case: Case, how: str) -> dict[str, Any]:
    """Process 1 brings what it cannot take a step with; return how the step ended here."""
    net, closure, _ = MODELS[case.model](rows_of(rank, case.parts))
    optimizer = optimizer_of(case, net)
    optimizer.step(closure)
    if rank == 1 and how == "option":
        optimizer.param_groups[0]["lr"] = -1.0
    elif rank == 1 and how == "frozen":
        net.requires_grad_(False)
    elif rank == 1 and how == "NaN":
        with torch.no_grad():
            next(net.parameters())[0, 0] = math.nan
    elif rank == 1:
        optimizer.grad_scale = torch.ones(())  # as a GradScaler leaves it
    before, words, begin = str(values(net)), "", time.monotonic()
    try:
        optimizer.step(closure)
    except (RuntimeError, ValueError) as error:
        words = str(error)
    seconds = time.monotonic() - begin
    return {"words": words, "seconds": seconds, "moved": str(values(net)) != before}


def interrupted_at_random(rank: int, case: Case, count: int) -> list[tuple[str, list[float]]]:
    """Process 1 takes SIGINT at random moments; return how each step ended and the parameters."""
    net, closure, _ = MODELS[case.model](rows_of(rank, case.parts))
    optimizer, ends, draw = optimizer_of(case, net), list[tuple[str, list[float]]](), Random(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    begin = time.perf_counter()
    optimizer.step(closure)
    theta, length = values(net), time.perf_counter() - begin
    for _ in range(count):
        nn.utils.vector_to_parameters(torch.tensor(theta, dtype=torch.double), net.parameters())
        how = ""
        send = threading.Timer(1.2 * length * draw.random(), signal.raise_signal, [signal.SIGINT])
        try:
            if rank == 1:
                send.start()
            optimizer.step(closure)
        except (KeyboardInterrupt, RuntimeError) as error:
            how = f"{type(error).__name__}: {error}"
        while send.is_alive():
            with suppress(KeyboardInterrupt):
                send.join()
        ends.append((how, values(net)))
    return ends


def begin_with_other_state(rank: int, case: Case) -> list[float]:
    """Process 1 forgets the state of its optimizer; return the parameters after another step."""
    net, closure, _ = MODELS[case.model](rows_of(rank, case.parts))
    optimizer = optimizer_of(case, net)
    for _ in range(3):
        optimizer.step(closure)
    if rank == 1:
        optimizer = optimizer_of(case, net)
    optimizer.step(closure)
    return values(net)


def sharded(rank: int, how: str) -> None:
    """Give an optimizer parameters of which this process has a part."""
    # here, since they take seconds to import
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, net = init_device_mesh("cpu", (2,)), network(3)
    params: Any = net.parameters()
    if how == "fully_shard":
        fully_shard(net, mesh=mesh)
    elif how == "DTensor":
        params = [distribute_tensor(p, mesh, [Shard(0)]) for p in params]
    else:
        original = how == "FSDP, original parameters"
        cpu = torch.device("cpu")
        wrapped = FSDP(net, device_mesh=mesh, device_id=cpu, use_orig_params=original)
        params = wrapped.parameters()
    NaturalTrustRegion(params)
