"""NaturalTrustRegion as an optimizer of torch: rates, schedulers, groups, state."""

import copy
import io
import pickle

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions as td
from torch import nn

from optimizers import natural
from problems import bits, problem, unchanged
from strategies import costly
from trustregion import Status


def test_learning_rate_is_a_factor_on_the_length():
    lengths = []
    for lr in (1.0, 0.5, torch.tensor(0.25)):
        model, closure = problem(torch.float64)
        before = torch.cat([p.reshape(-1) for p in bits(model)])
        natural(model.parameters(), 1e-8, lr=lr).step(closure)
        lengths.append((torch.cat([p.reshape(-1) for p in bits(model)]) - before).norm())
    assert (lengths[1] / lengths[2]).item() == pytest.approx(2, rel=1e-6)
    assert (lengths[0] / lengths[1]).item() == pytest.approx(2, rel=1e-6)


def test_schedulers_work_and_a_rate_of_zero_is_a_no_op():
    model, closure = problem()
    optimizer = natural(model.parameters(), 0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: min(1.0, epoch / 2))
    kept, kls = bits(model), []
    for _ in range(3):
        optimizer.step(closure)
        kls.append(optimizer.info.kl)
        if len(kls) == 1:
            assert optimizer.info.status is Status.ZERO_LENGTH
            assert unchanged(model, kept)
        scheduler.step()
    assert kls[0] == 0
    assert all(0 < kl <= 0.01 for kl in kls[1:])


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, 10, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.1, 1.0, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
    ],
)
def test_torchs_schedulers_work(make):
    model, closure = problem()
    optimizer = natural(model.parameters(), 0.01)
    scheduler = make(optimizer)
    for _ in range(5):
        loss = optimizer.step(closure)
        assert optimizer.info.accepted
        plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
        scheduler.step(*[loss] * plateau)


def test_damping_can_be_a_tensor():
    model, closure = problem()
    optimizer = natural(model.parameters(), 0.01, damping=torch.tensor(1e-3))
    optimizer.step(closure)
    assert optimizer.info.accepted


def test_delta_can_be_scheduled():
    model, closure = problem()
    optimizer = natural(model.parameters(), 0.01)
    optimizer.param_groups[0]["delta"] = torch.tensor(1e-5)
    optimizer.step(closure)
    assert 0 < optimizer.info.kl <= 1e-5
    optimizer.param_groups[0]["delta"] = -1.0
    kept = bits(model)
    with pytest.raises(ValueError, match="delta must be a positive KL radius"):
        optimizer.step(closure)
    assert unchanged(model, kept)


def test_groups_share_one_ball_and_have_their_own_rates():
    single, closure = problem(torch.float64)
    natural(single.parameters(), 0.01).step(closure)
    model, closure = problem(torch.float64)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    optimizer = natural(groups, 0.01)
    optimizer.step(closure)
    assert unchanged(model, bits(single))

    model, closure = problem(torch.float64)
    kept = bits(model)
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    optimizer = natural(groups, 0.01)
    optimizer.step(closure)
    assert optimizer.info.accepted
    now = bits(model)
    assert all(torch.equal(a, b) for a, b in zip(kept[:2], now[:2], strict=True))
    assert not torch.equal(kept[2], now[2])


@costly
@given(st.integers(0, 1000), st.floats(0.0, 1.0), st.sampled_from([1e-4, 1e-2, 1.0]))
def test_unequal_rates_still_give_a_descent_direction(seed, rate, damping):
    model, closure = problem(torch.float64, seed, n=20)
    groups = [{"params": model[0].parameters(), "lr": rate}, {"params": model[2].parameters()}]
    optimizer = natural(groups, 0.01, damping=damping)
    for _ in range(3):
        optimizer.step(closure)
        assert optimizer.info.predicted_reduction > 0
        assert optimizer.info.accepted


def test_unequal_rates_reach_the_edge_and_keep_the_prediction():
    model, closure = problem(torch.float64)
    groups = [{"params": model[0].parameters(), "lr": 0.3}, {"params": model[2].parameters()}]
    optimizer = natural(groups, 1e-8, damping=0.1, backtrack_factor=0.95)
    optimizer.step(closure)
    assert optimizer.info.rho == pytest.approx(1, abs=0.01)
    assert optimizer.info.kl >= 0.8e-8


def test_a_group_at_rate_zero_is_as_if_it_were_frozen():
    frozen, closure = problem(torch.float64)
    for p in frozen[0].parameters():
        p.requires_grad_(False)
    natural(frozen[2].parameters(), 0.01).step(closure)
    model, closure = problem(torch.float64)
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    natural(groups, 0.01).step(closure)
    for ours, expected in zip(model.parameters(), frozen.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_a_gradient_in_groups_of_rate_zero_only_is_stationary():
    p, q = (torch.zeros(2, requires_grad=True) for _ in range(2))
    optimizer = natural([{"params": [p], "lr": 0.0}, {"params": [q]}], 0.01)
    optimizer.step(lambda: (p.sum() + 0 * q.sum(), td.Normal(p + q, 1.0)))
    assert optimizer.info.status is Status.STATIONARY


def test_groups_that_disagree_are_refused_and_not_added():
    p, q = (torch.zeros(2, requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match=r"delta is 0.1 in group 0 and 0.2 in group 1"):
        natural([{"params": [p], "delta": 0.1}, {"params": [q], "delta": 0.2}])
    optimizer = natural([p], 0.1)
    with pytest.raises(ValueError, match="share one trust region"):
        optimizer.add_param_group({"params": [q], "damping": 3.0})
    assert len(optimizer.param_groups) == 1


def test_frozen_and_unused_parameters_stay():
    model, closure = problem()
    unused = nn.Parameter(torch.ones(2))
    model[0].weight.requires_grad_(False)
    kept = bits(model)
    optimizer = natural([*model.parameters(), unused], 0.01)
    optimizer.step(closure)
    assert optimizer.info.accepted
    assert torch.equal(model[0].weight, kept[0])
    assert not torch.equal(model[0].bias, kept[1])
    assert torch.equal(unused, torch.ones(2))
    model[0].weight.requires_grad_(True)  # unfreezing works too
    optimizer.step(closure)
    assert not torch.equal(model[0].weight, kept[0])


def test_tied_parameters():
    torch.manual_seed(0)
    embed = nn.Linear(4, 4, bias=False)
    x, y = torch.randn(20, 4), torch.randint(4, (20,))

    def closure():
        distribution = td.Categorical(logits=torch.tanh(embed(x)) @ embed.weight)
        return -distribution.log_prob(y).mean(), distribution

    optimizer = natural(embed.parameters(), 0.01)
    optimizer.step(closure)
    assert optimizer.info.accepted


def _train(steps, optimizer, closure):
    for _ in range(steps):
        optimizer.step(closure)


def test_resuming_from_a_state_dict_is_exact():
    straight, closure = problem()
    _train(6, natural(straight.parameters(), 0.02), closure)

    model, closure = problem()
    optimizer = natural(model.parameters(), 0.02)
    _train(3, optimizer, closure)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, closure = problem()
    resumed.load_state_dict(saved["model"])
    optimizer = natural(resumed.parameters())
    optimizer.load_state_dict(saved["optimizer"])
    _train(3, optimizer, closure)
    assert unchanged(resumed, bits(straight))
    assert optimizer.param_groups[0]["delta"] == 0.02
    steps = [state["step"].item() for state in optimizer.state.values()]
    assert steps == [6.0] * 4


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_of_an_optimizer_step(duplicate):
    model, closure = problem()
    optimizer = natural(
        model.parameters(),
        0.02,
        preconditioner=torch.eye(sum(p.numel() for p in model.parameters())),
    )
    optimizer.step(closure)
    twin = duplicate(optimizer)
    assert twin.info == optimizer.info
    assert torch.equal(twin.preconditioner, optimizer.preconditioner)
    params = twin.param_groups[0]["params"]
    x = torch.randn(10, 5)

    def own():
        hidden = torch.tanh(x @ params[0].T + params[1])
        distribution = td.Categorical(logits=hidden @ params[2].T + params[3])
        return -distribution.log_prob(torch.zeros(10)).mean(), distribution

    twin.step(own)
    assert twin.info.accepted


def test_a_state_dict_of_an_older_version_loads():
    model, closure = problem()
    optimizer = natural(model.parameters(), 0.02)
    optimizer.step(closure)
    state = optimizer.state_dict()
    del state["param_groups"][0]["cg_rtol"]
    other = natural(model.parameters())
    other.load_state_dict(state)
    other.step(closure)
    assert other.param_groups[0]["cg_rtol"] == other.defaults["cg_rtol"]


def test_a_step_without_closure_is_for_checkpointing_libraries():
    model, closure = problem()
    optimizer = natural(model.parameters(), 0.01)
    kept = bits(model)
    assert optimizer.step() is None
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    assert optimizer.step(None) is None
    assert unchanged(model, kept)
    assert len(optimizer.state) == len(kept)  # every parameter has state, as they require
    model[0].bias.grad += 1
    with pytest.raises(RuntimeError, match="needs a closure"):
        optimizer.step()
    optimizer.step(closure)


def test_distributed_checkpointing_reads_and_restores_the_state():
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model, closure = problem()
    optimizer = natural(model.parameters(), 0.02)
    kept = bits(model)
    state = get_optimizer_state_dict(model, optimizer)  # before the first step
    assert set(state["state"]) == {name for name, _ in model.named_parameters()}
    other = natural(model.parameters())
    set_optimizer_state_dict(model, other, state)
    assert unchanged(model, kept)
    assert other.param_groups[0]["delta"] == 0.02
    other.step(closure)
    assert other.info.accepted


def test_hooks_run_once_and_in_order():
    model, closure = problem()
    optimizer = natural(model.parameters(), 0.01)
    order = []
    optimizer.register_step_pre_hook(lambda *_: order.append("before"))
    optimizer.register_step_post_hook(lambda *_: order.append("after"))
    optimizer.step(closure)
    assert order == ["before", "after"]
    assert "delta: 0.01" in repr(optimizer)
