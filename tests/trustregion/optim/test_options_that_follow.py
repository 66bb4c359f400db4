"""Options that follow the steps: they come back, and only measurements move them."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Categorical

from optimizers import natural, newton
from problems import closure_of, data
from trustregion import (
    Jacobi,
    Nystrom,
    Status,
)


def minimum(model, x, targets):
    """The smallest loss, as L-BFGS finds it."""
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss, _ = closure_of(model, x, targets)()
        loss.backward()
        return loss

    optimizer.step(closure)
    return closure().item()


@pytest.mark.parametrize(
    "options",
    [
        {"delta": 0.01, "max_delta": 0.1},
        {"delta": math.inf, "penalty": 1.0, "kl_target": 1e-2},
    ],
)
@pytest.mark.slow
def test_they_recover_after_convergence(options):
    """Of a converged loss every step is rejected; then the task changes."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(64, 4)
    targets = torch.randint(3, (64,))
    closure = closure_of(model, x, targets)
    optimizer = natural(model.parameters(), **options)
    for _ in range(60):  # it converges in ten
        optimizer.step(closure)
    assert optimizer.info.status is Status.REJECTED_LOSS
    group = optimizer.param_groups[0]
    assert group["delta"] >= 1e-7
    assert group["penalty"] is None or group["penalty"] <= 1e6
    targets.copy_(torch.randint(3, (64,)))
    before = closure()[0].item()
    for _ in range(30):
        optimizer.step(closure)
    after = closure()[0].item()
    assert after == pytest.approx(minimum(nn.Linear(4, 3), x, targets), rel=1e-3)
    assert after < before - 0.1


@pytest.mark.parametrize("solver", ["gltr", "cg"])
def test_trials_that_cannot_be_compared_move_nothing(solver):
    model, x, y = data(torch.float32, n=64)
    closure, bad = closure_of(model, x, y), [False]

    def sometimes():
        loss, distribution = closure()
        return (loss * math.nan if bad[0] and not torch.is_grad_enabled() else loss), distribution

    radius = math.inf if solver == "cg" else 1.0
    optimizer = newton(
        model.parameters(), radius, curvature="ggn", damping=0.1, damping_factor=1.5, solver=solver
    )
    optimizer.step(sometimes)
    before = dict(optimizer.param_groups[0])
    bad[0] = True
    optimizer.step(sometimes)
    assert optimizer.info.status is Status.NOT_REPRODUCIBLE
    assert optimizer.param_groups[0]["radius"] == before["radius"]
    assert optimizer.param_groups[0]["damping"] == before["damping"]


def test_a_late_group_takes_what_the_steps_have_moved():
    model, x, y = data(torch.float32, n=64)
    optimizer = newton(model[2].parameters(), radius=0.1)
    for _ in range(3):
        optimizer.step(lambda: closure_of(model, x, y)()[0])
    moved = optimizer.param_groups[0]["radius"]
    assert moved != 0.1
    optimizer.add_param_group({"params": list(model[0].parameters())})
    assert optimizer.param_groups[1]["radius"] == moved
    optimizer.step(lambda: closure_of(model, x, y)()[0])
    assert optimizer.info.accepted
    with pytest.raises(ValueError, match="radius"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "radius": 7.0})


def test_a_single_length_is_kept():
    """The search goes no further towards the edge than the fraction that was asked for."""
    for scale in (0.25, 0.5):
        model, x, y = data(torch.float32, n=64)
        optimizer = natural(model.parameters(), 0.01, scales=(scale,))
        optimizer.step(closure_of(model, x, y))
        assert optimizer.info.accepted
        assert optimizer.info.scale <= scale * 1.05  # 0.9 of the KL at least, and no more than it


def test_a_frozen_group_does_not_set_the_length():
    kls = []
    for rate in (0.1, 1.0):
        model, x, y = data(torch.float32, n=64)
        model[0].requires_grad_(False)
        groups = [
            {"params": list(model[0].parameters()), "lr": rate},
            {"params": list(model[2].parameters()), "lr": 0.1},
        ]
        optimizer = natural(groups, 0.01)
        optimizer.step(closure_of(model, x, y))
        kls.append(optimizer.info.kl)
    assert kls[0] == kls[1] == pytest.approx(1e-4, rel=0.1)


def test_a_group_that_stays_needs_no_kl():
    model, x, y = data(torch.float32, n=64)
    other = nn.Parameter(torch.ones(1))
    groups = [{"params": list(model.parameters())}, {"params": [other], "lr": 0.0}]
    optimizer = natural(groups, 0.01)

    def closure():
        loss, distribution = closure_of(model, x, y)()
        return loss + other.square().sum(), distribution

    optimizer.step(closure)
    assert optimizer.info.accepted
    assert other.item() == 1.0
    groups[1]["lr"] = 1.0
    optimizer.param_groups[1]["lr"] = 1.0
    with pytest.raises(ValueError, match="the distribution does not"):
        optimizer.step(closure)


def test_products_count_those_of_a_build():
    model, x, y = data(torch.float32, n=64)
    made = []

    class Spy(Nystrom):
        def build(self, A, damping):
            M = super().build(A, damping)
            made.append(self.products)
            return M

    second = newton(model.parameters(), curvature="ggn", preconditioner=Spy(8))
    second.step(closure_of(model, x, y))
    assert made[-1] > 0
    assert second.info.products == made[-1] + second.info.cg_iterations
    first = natural(model.parameters(), preconditioner=Spy(8))
    made.clear()

    def constrained():
        loss, distribution = closure_of(model, x, y)()
        return loss, distribution, model[2].bias.sum().reshape(1) - 10.0

    first.step(constrained)
    assert first.info.products > made[-1] > 0
    assert first.info.preconditioner == "Spy"


def test_a_state_without_a_preconditioner_starts_it_over():
    model, x, y = data(torch.float32, n=64)
    optimizer = natural(model.parameters(), preconditioner=Jacobi())
    plain = natural(model.parameters())
    for _ in range(3):
        optimizer.step(closure_of(model, x, y))
    assert optimizer.preconditioner.enabled is not None
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.preconditioner.enabled is None
    assert optimizer.preconditioner.preconditioner.state == {}


def test_a_rejected_step_has_no_kl():
    """Also where the change is lost in the rounding of the loss."""
    model, x, y = data(torch.float32, n=64)
    optimizer = newton(model.parameters(), math.inf, curvature="ggn", solver="cg", damping=0.1)
    inner = closure_of(model, x, y)

    def closure():
        loss, distribution = inner()
        return loss + 1e8, distribution  # whose float32 neighbours are eight apart

    optimizer.step(closure)
    assert optimizer.info.status is Status.CONVERGED
    assert optimizer.info.kl == optimizer.info.actual_reduction == 0


def test_an_empty_batch_is_refused_in_words():
    model = nn.Linear(4, 3)
    optimizer = newton(model.parameters(), curvature="ggn")

    def closure():
        outputs = model(torch.zeros(0, 4))
        return outputs.sum() + model.weight.square().sum(), outputs

    with pytest.raises(ValueError, match="holds no samples"):
        optimizer.step(closure)


def test_evaluations_count_the_closure_alone():
    model, x, y = data(torch.float32, n=64)
    calls = []

    def closure():
        calls.append(1)
        return closure_of(model, x, y)()

    optimizer = natural(model.parameters(), 0.01)
    optimizer.step(closure, curvature=lambda: Categorical(logits=model(x[:32])))
    assert optimizer.info.evaluations == len(calls)
