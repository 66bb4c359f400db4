"""Checks 31 to 40: copies, trainers, faults and long runs."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import random
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .problem import (
    Problem,
    Subject,
    assign,
    clones,
    equal,
    must_refuse,
    params_of,
    raised,
    resumed,
    same,
    squares,
    start,
    value,
)


def check_31(subject: Subject) -> None:
    """A deepcopied or unpickled optimizer steps on."""
    for duplicate in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        problem = Problem()
        run = start(subject, problem)
        run.step()
        kept = clones(run.params)
        twin = duplicate(run.optimizer)
        params = params_of(twin)
        assert all(p is not q for p, q in zip(params, run.params, strict=True))
        twin.step(subject.closure(twin, lambda p=params, of=problem: of.evaluate_with(p)))
        assert same(run.params, kept), "the copy moved the original's parameters"
        run.step()
        assert same(params, run.params), "the copy does not step as the original does"


def check_32(subject: Subject) -> None:
    """Distributed checkpointing reads the state before the first step, and restores it."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    problem, fresh = Problem(), Problem(seed=1)
    run, twin = start(subject, problem), start(subject, fresh)
    kept = clones(problem.params)
    get_optimizer_state_dict(problem.model, run.optimizer)
    assert same(problem.params, kept), "reading the state moved the parameters"
    run.step(2)
    state = get_optimizer_state_dict(problem.model, run.optimizer)
    kept = clones(fresh.params)
    options = StateDictOptions(strict=True)
    set_optimizer_state_dict(fresh.model, twin.optimizer, state, options=options)
    assert same(fresh.params, kept), "restoring the state moved the parameters"
    states = [o.optimizer.state_dict()["state"] for o in (twin, run)]
    assert equal(*states), "what was restored differs"
    assign(fresh.params, problem.params)
    fresh.x, fresh.y = problem.x, problem.y
    run.step()
    twin.step()
    assert same(fresh.params, problem.params), "the restored one does not step as the saved one"


def check_33(subject: Subject) -> None:
    """load_state_dict keeps every number of the state, also next to float32 parameters."""
    run = start(subject)
    run.step(3)
    state = copy.deepcopy(run.optimizer.state_dict())
    twin = resumed(subject, run, state)
    assert equal(twin.optimizer.state_dict(), state), "what was loaded differs"


def check_34(subject: Subject) -> None:
    """A GradScaler with a closure is refused in both forms; the optimizer then still works."""
    problem = Problem()
    run = start(subject, problem)
    kept = clones(run.params)
    for form in ("positional", "keyword"):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(problem.evaluate()[0]).backward()
        args = ((run.closure,), {}) if form == "positional" else ((), {"closure": run.closure})

        def step(scaler: Any = scaler, args: Any = args) -> None:
            scaler.step(run.optimizer, *args[0], **args[1])

        must_refuse(step, "GradScaler")
        assert same(run.params, kept)
    before = value(problem.evaluate)
    run.step()
    assert value(problem.evaluate) < before


def check_35(subject: Subject) -> None:
    """Inference mode, in which there is no gradient, is refused, and nothing moves."""
    run = start(subject)
    kept = clones(run.params)
    with torch.inference_mode():
        assert raised(run.step, RuntimeError) is not None, "nothing was raised"
    assert same(run.params, kept)


def check_36(subject: Subject) -> None:
    """An exception or Ctrl-C at any call of the closure restores every parameter bit for bit."""
    problem, calls, limit = Problem(), 0, math.inf

    def evaluate() -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        if calls == limit:
            raise error
        return problem.evaluate()

    for error in (ArithmeticError("in the closure"), KeyboardInterrupt()):
        for k in range(1, 30):
            problem, calls, limit = Problem(), 0, k
            optimizer = subject.make(problem.params)
            closure, kept = subject.closure(optimizer, evaluate), clones(problem.params)
            caught = raised(lambda o=optimizer, c=closure: o.step(c), type(error))
            if caught is None:
                assert k > 2, "no trial was interrupted"
                break
            assert caught is error
            assert same(problem.params, kept), f"{type(error).__name__} at call {k}"
            limit = math.inf
            optimizer.step(closure)


def check_37(subject: Subject) -> None:
    """A step draws no random numbers of its own."""
    run = start(subject)
    numpy = sys.modules.get("numpy")

    def states() -> list[object]:
        drawn = [torch.get_rng_state().tolist(), random.getstate()]
        return drawn if numpy is None else [*drawn, str(numpy.random.get_state())]

    before = states()
    run.step(3)
    after = states()
    for name, ours, kept in zip(("torch", "random", "numpy"), after, before, strict=False):
        assert ours == kept, f"it draws from {name}"


def check_38(subject: Subject) -> None:
    """Train and eval flags, buffers, .grad, requires_grad and the grad mode are left alone."""
    problem = Problem()
    norm = nn.BatchNorm1d(2).eval()

    def evaluate() -> tuple[Tensor, Tensor]:
        outputs = norm(problem.evaluate()[1])
        return squares(outputs - problem.y), outputs

    optimizer = subject.make(problem.params)
    closure = subject.closure(optimizer, evaluate)
    for p in problem.params:
        p.grad = torch.full_like(p, 7.0)
    with torch.enable_grad():
        closure()
    own = all(p.grad is not None and bool((p.grad == 7.0).all()) for p in problem.params)
    buffers = clones(list(norm.buffers()))
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            optimizer.step(closure)
            assert torch.is_grad_enabled() == enabled
    if own:  # the closure does not write .grad, so neither may the step
        assert all(bool((p.grad == 7.0).all()) for p in problem.params)
    assert problem.model.training
    assert not norm.training
    assert same(list(norm.buffers()), buffers)
    assert all(p.requires_grad for p in problem.params)


PEAK = 40  # the graph, conjugate gradients or a Krylov space, a line search; float64 counts twice


def check_39(subject: Subject) -> None:
    """The memory of thirty steps peaks below 40 vectors of the parameters' size."""
    from torch.profiler import ProfilerActivity, profile

    n = 20_000
    p = torch.linspace(-1, 1, n).requires_grad_()
    x = torch.randn(16, n // 8)  # a wide layer: activations take no memory to speak of

    def evaluate() -> tuple[Tensor, Tensor]:
        outputs = (x @ p.view(8, -1).T / n**0.5).tanh()
        return squares(outputs - 0.5), outputs

    optimizer = subject.make([p])
    closure = subject.closure(optimizer, evaluate)
    optimizer.step(closure)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(30):
            optimizer.step(closure)
    results: Any = profiler.profiler  # its public events() lacks allocations within operators
    held = peak = 0
    for event in results.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    vectors = peak / (n * p.element_size())
    assert vectors >= 2, "nothing was measured"
    assert vectors <= PEAK, f"{vectors:.0f} vectors"


def check_40(subject: Subject) -> None:
    """Sixty steps leave as many tensors as twenty: no graph is kept."""
    problem = Problem()
    run, theta = start(subject, problem), clones(problem.params)
    run.step(20)
    before = _tensors()
    for _ in range(2):
        run.step(20)
        assign(problem.params, theta)  # away from the minimum, where a step would end early
    after = _tensors()
    assert after <= before, f"{before} tensors became {after}"


def _tensors() -> int:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some modules warn when they are looked at
        return sum(isinstance(o, Tensor) for o in gc.get_objects())
