"""The life of an optimizer under fire, beside that of a twin that never sees a fault."""

import copy
import io
import math
import signal
import warnings

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn

from contract.problem import equal
from optimizers import natural, newton
from problems import closure_of, network
from trustregion import KFAC, Jacobi, Nystrom
from trustregion.operators.gauss_newton import GaussNewtonOperator
from trustregion.operators.hessian import HessianOperator
from trustregion.preconditioners import Recycled

MAKERS = {
    "natural": lambda _, params: natural(params),
    "natural, followed": lambda _, params: natural(
        params, warm_start=0.5, max_delta=0.1, damping_factor=1.5
    ),
    "penalty": lambda _, params: natural(params, penalty=10.0, kl_target=1e-3, delta=math.inf),
    "jacobi": lambda _, params: natural(params, preconditioner=Jacobi()),
    "nystrom": lambda _, params: natural(params, preconditioner=Nystrom(2, every=2)),
    "recycled": lambda _, params: natural(params, preconditioner=Recycled(2)),
    "kfac": lambda net, params: natural(params, preconditioner=KFAC(net)),
    "newton": lambda _, params: newton(params),
    "newton, cg": lambda _, params: newton(
        params, math.inf, curvature="ggn", solver="cg", damping=1.0, damping_factor=1.5,
        warm_start=0.9,
    ),
    "newton, jacobi": lambda _, params: newton(params, curvature="ggn", preconditioner=Jacobi()),
}  # fmt: skip
CPU = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory"
MEMORY = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU), MemoryError()]
LAYERS = 3  # linear layers, each a group of parameters


class Side:
    """A network and its optimizer; some calls of the closure may fail."""

    def __init__(self, kind, seed):
        torch.manual_seed(seed)
        self.kind = kind
        self.model = network(3, 4, 4, nn.Dropout(0.2), nn.Linear(4, 4), nn.Tanh()).double()
        self.data = torch.randn(10, 3).double(), torch.randint(4, (10,))
        self.optimizer = self.make(self.groups(1))

    def make(self, groups):
        return MAKERS[self.kind](self.model, groups)

    def groups(self, count):
        linear = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        return [{"params": list(layer.parameters())} for layer in linear[:count]]

    def step(self, seed, befall=lambda _, loss: loss):
        """Take a step; ``befall`` sees each call and its loss. Return the number of calls."""
        compute, calls = closure_of(self.model, *self.data), 0

        def closure():
            nonlocal calls
            calls += 1
            loss, prediction = compute()
            return befall(calls, loss), prediction

        torch.manual_seed(seed)
        self.optimizer.step(closure)
        return calls

    def values(self):
        return [p.detach().clone() for p in self.model.parameters()]

    def state(self):
        """The state, but for the counts of steps and an option that torch adds to copies."""
        state = copy.deepcopy(self.optimizer.state_dict())
        for entry in (*state["state"].values(), *state["param_groups"]):
            entry.pop("step", None)
            entry.pop("differentiable", None)
        return state


FAULTS = {
    "exception": lambda: (_ for _ in ()).throw(ValueError("a broken batch")),
    "memory": lambda: (_ for _ in ()).throw(MemoryError("of the closure")),
    "interrupt": lambda: (_ for _ in ()).throw(KeyboardInterrupt),
    "signal": lambda: signal.raise_signal(signal.SIGINT),
}


class Life(RuleBasedStateMachine):
    """What befalls an optimizer; its twin takes the same steps without the faults."""

    @initialize(kind=st.sampled_from(sorted(MAKERS)), seed=st.integers(0, 3))
    def begin(self, kind, seed):
        self.ours, self.twin = Side(kind, seed), Side(kind, seed)
        self.groups, self.seed = 1, 100

    @property
    def sides(self):
        return self.ours, self.twin

    @rule()
    def step(self):
        self.seed += 1
        for side in self.sides:
            side.step(self.seed)

    @rule(fault=st.sampled_from(sorted(FAULTS)), at=st.integers(1, 6))
    def faulty_step(self, fault, at):
        def befall(call, loss):
            if call == at:
                FAULTS[fault]()
            return loss

        self.seed += 1
        torch.manual_seed(self.seed)
        generator, info = torch.get_rng_state(), self.ours.optimizer.info
        try:
            self.ours.step(self.seed, befall)
        except (ValueError, MemoryError, KeyboardInterrupt):
            assert torch.equal(torch.get_rng_state(), generator)
            assert self.ours.optimizer.info is info
        else:  # The step was over before that call.
            self.twin.step(self.seed)

    @rule(first=st.integers(1, 2))
    def nan_step(self, first):
        """NaN from some call on: nothing moves, and what the step learned is taken over."""
        self.seed += 1
        before = self.ours.values()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.ours.step(self.seed, lambda call, loss: loss * (math.nan if call >= first else 1))
        assert not self.ours.optimizer.info.accepted
        assert all(map(torch.equal, before, self.ours.values()))
        self.twin.optimizer.load_state_dict(copy.deepcopy(self.ours.optimizer.state_dict()))

    @rule()
    def save_and_load(self):
        stream = io.BytesIO()
        torch.save(self.ours.optimizer.state_dict(), stream)
        stream.seek(0)
        fresh = self.ours.make(self.ours.groups(self.groups))
        fresh.load_state_dict(torch.load(stream, weights_only=True))
        self.ours.optimizer = fresh

    @rule()
    def copy(self):
        self.ours = copy.deepcopy(self.ours)

    @rule(group=st.integers(0, LAYERS - 1), lr=st.sampled_from([0.1, 0.5, 1.0]))
    def schedule_lr(self, group, lr):
        for side in self.sides:
            side.optimizer.param_groups[min(group, self.groups - 1)]["lr"] = lr

    @rule(factor=st.sampled_from([0.5, 2.0]))
    def schedule_the_size(self, factor):
        for side in self.sides:
            for group in side.optimizer.param_groups:
                name = "radius" if "radius" in group else "delta"
                size = factor * group[name]
                group[name] = size if math.isinf(size) else min(size, 0.1)  # at most max_delta

    @rule(index=st.integers(0, 2 * LAYERS - 1), trainable=st.booleans())
    def freeze_or_unfreeze(self, index, trainable):
        for side in self.sides:
            params = list(side.model.parameters())
            params[index].requires_grad_(trainable)
            params[0].requires_grad_(True)  # One is left.

    # Before the first step, a new group takes the defaults and not what a schedule has written.
    @precondition(lambda self: self.groups < LAYERS and self.twin.optimizer.state)
    @rule()
    def add_param_group(self):
        self.groups += 1
        for side in self.sides:
            side.optimizer.add_param_group(side.groups(self.groups)[-1])

    @invariant()
    def the_parameters_are_finite_and_those_of_the_twin(self):
        if not hasattr(self, "ours"):
            return
        ours, twin = self.ours.values(), self.twin.values()
        assert all(bool(p.isfinite().all()) for p in ours)
        assert all(map(torch.equal, ours, twin))
        assert equal(self.ours.state(), self.twin.state())


QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much]


def test_a_life_with_faults_is_that_of_a_twin_without_them():
    fast = settings(max_examples=10, stateful_step_count=12, suppress_health_check=QUIET)
    run_state_machine_as_test(Life, settings=fast)


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_long_lives_with_faults_are_those_of_twins_without_them():
    long = settings(max_examples=200, stateful_step_count=40, suppress_health_check=QUIET)
    run_state_machine_as_test(Life, settings=long)


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_step_that_fails_leaves_all_of_the_state_as_it_was(kind, at):
    side = Side(kind, 0)
    for seed in (1, 2):
        side.step(seed)
    before, values = copy.deepcopy(side.optimizer.state_dict()), side.values()

    def befall(call, loss):
        if call == at:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        side.step(3, befall)
    assert equal(side.optimizer.state_dict(), before)
    assert all(map(torch.equal, side.values(), values))


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("error", MEMORY)
def test_a_step_without_memory_for_a_product_changes_nothing_and_says_what_helps(
    monkeypatch, kind, error
):
    side = Side(kind, 0)
    side.step(1)
    before, values = copy.deepcopy(side.optimizer.state_dict()), side.values()

    def fail(operator, v):
        raise error

    for operator in (GaussNewtonOperator, HessianOperator):
        monkeypatch.setattr(operator, "mv", fail)
    with pytest.raises(type(error)) as raised:
        side.step(2)
    assert "smaller batch" in raised.value.__notes__[-1]
    assert equal(side.optimizer.state_dict(), before)
    assert all(map(torch.equal, side.values(), values))
