"""What a step reports, what an optimizer shows of itself, and the records that hold its options."""

import math
import re
from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from optimizers import natural, newton
from problems import closure_of, data
from trustregion import NaturalTrustRegion, NewtonTrustRegion, Status
from trustregion.optim import Adapt, Region, Search

kinds = pytest.mark.parametrize("kind", [natural, newton])


@kinds
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("rates", [(1.0, 1.0), (1.0, 0.1), (0.5, 0.0)])
def test_the_reported_gradient_is_that_of_autograd(kind, maximize, rates):
    model, x, y = data()
    closure = closure_of(model, x, y)
    groups = [{"params": model[0].parameters(), "lr": rates[0]}]
    groups.append({"params": model[2].parameters(), "lr": rates[1]})
    optimizer = kind(groups, maximize=maximize)
    for _ in range(2):
        grads = torch.autograd.grad(closure()[0], list(model.parameters()))
        g = torch.cat([t.reshape(-1) for t in grads])
        optimizer.step(closure)
        # The norm is summed in another order.
        assert optimizer.info.gradient_norm == pytest.approx(g.norm().item(), rel=1e-12)
        assert optimizer.info.largest_gradient == pytest.approx(g.abs().max().item(), rel=1e-12)


@kinds
def test_no_gradient_is_reported_where_none_was_taken(kind):
    model, x, y = data()
    optimizer = kind(model.parameters())
    loss, prediction = closure_of(model, x, y)()
    optimizer.step(lambda: (math.nan * loss, prediction))
    assert optimizer.info.status is Status.NONFINITE_LOSS
    assert math.isnan(optimizer.info.gradient_norm)
    assert math.isnan(optimizer.info.largest_gradient)


def stepped(kind, **options):
    model, x, y = data()
    optimizer = kind(model.parameters(), **options)
    optimizer.step(closure_of(model, x, y))
    assert optimizer.info.accepted
    return optimizer


def test_a_line_of_a_log_says_what_bounded_the_step():
    info = stepped(natural, delta=0.02).info
    assert str(info) == (
        f"accepted: loss {info.loss:.6g} -> {info.new_loss:.6g}, kl {info.kl:.3g} of 0.02,"
        f" rho {info.rho:.3g}, cg {info.cg_iterations}, backtracks {info.backtracks}"
    )
    assert " of " not in str(stepped(natural, delta=math.inf, penalty=1.0).info)
    assert "radius 0.5" in str(stepped(newton, radius=0.5).info)
    damped = str(stepped(newton, radius=math.inf, damping=2.0).info)
    assert "damping 2" in damped
    assert "radius" not in damped
    assert "kl" not in damped


@kinds
def test_the_line_of_a_maximized_loss_calls_it_the_objective(kind):
    info = stepped(kind, maximize=True).info
    assert info.new_loss > info.loss
    assert info.actual_reduction > 0
    assert f"objective {info.loss:.6g} -> {info.new_loss:.6g}" in str(info)
    assert "loss" not in str(info)
    assert "objective" not in str(stepped(kind).info)


def test_an_optimizer_shows_its_settings():
    x = torch.zeros(3, requires_grad=True)
    optimizer = newton([x], curvature="ggn", solver="steihaug", metric="fisher", rule="classic")
    for word in ("curvature='ggn'", "solver='steihaug'", "metric='fisher'", "rule='classic'"):
        assert word in repr(optimizer)
    assert "3 parameters; last step: no step yet" in repr(optimizer)
    optimizer = stepped(natural)
    assert f"last step: {optimizer.info}" in repr(optimizer)
    assert "99 parameters" not in repr(optimizer)
    size = sum(p.numel() for p in optimizer.param_groups[0]["params"])
    assert f"{size:,} parameters" in repr(optimizer)


WRONG = [
    (NaturalTrustRegion, {"search": {"max_kl": 1}}, "search must be a trustregion.optim.Search"),
    (NaturalTrustRegion, {"adapt": Search()}, "adapt must be a trustregion.optim.Adapt"),
    (NaturalTrustRegion, {"search": None}, "search must be a trustregion.optim.Search"),
    (NaturalTrustRegion, {"adapt": Adapt}, "adapt must be a trustregion.optim.Adapt"),
    (NewtonTrustRegion, {"region": {"solver": "cg"}}, "region must be a trustregion.optim.Region"),
    (NewtonTrustRegion, {"region": "cg"}, "region must be a trustregion.optim.Region"),
]


@pytest.mark.parametrize(("kind", "given", "words"), WRONG)
def test_a_wrong_record_is_refused_in_a_sentence(kind, given, words):
    name, record = next(iter(given.items()))
    example = rf"for example {name}=[A-Z]\w+\(\w+=\.\.\.\), got {re.escape(repr(record))}"
    with pytest.raises(TypeError, match=f"{re.escape(words)}, {example}"):
        kind([torch.zeros(2, requires_grad=True)], **given)


OTHER = {
    Search: {"backtrack_factor": 0.5, "max_backtracks": 7, "scales": (1.0, 0.5), "max_kl": 0.3},
    Adapt: {"max_delta": 0.5, "damping_factor": 2.5, "kl_target": 0.02, "warm_start": 0.75},
    Region: {
        "metric_damping": 0.5,
        "damping_factor": 2.5,
        "max_rejections": 7,
        "warm_start": 0.75,
        "solver": "steihaug",
        "metric": "fisher",
        "rule": "classic",
    },
}
ATTRIBUTES = ("solver", "metric", "rule")


def optimizer_with(record):
    params = [torch.zeros(2, requires_grad=True)]
    if isinstance(record, Region):
        return NewtonTrustRegion(params, region=record)
    name = type(record).__name__.lower()
    return NaturalTrustRegion(params, penalty=1.0, **{name: record})


@pytest.mark.parametrize(
    ("kind", "option"), [(kind, field.name) for kind in OTHER for field in fields(kind)]
)
def test_every_option_of_a_record_reaches_the_optimizer(kind, option):
    value = OTHER[kind][option]
    default, other = optimizer_with(kind()), optimizer_with(replace(kind(), **{option: value}))
    if option in ATTRIBUTES:
        assert getattr(default, option) == getattr(kind(), option) != getattr(other, option)
        assert getattr(other, option) == value
        return
    for optimizer, record in ((default, kind()), (other, replace(kind(), **{option: value}))):
        assert optimizer.param_groups[0][option] == getattr(record, option)
    plain, changed = default.param_groups[0], other.param_groups[0]
    assert {k for k in plain if k != "params" and plain[k] != changed[k]} == {option}


@pytest.mark.parametrize("kind", OTHER)
def test_a_record_is_frozen(kind):
    option = fields(kind)[0].name
    with pytest.raises(AttributeError):
        setattr(kind(), option, OTHER[kind][option])


WRITTEN = [
    (natural, "delta", 0.005, {}),
    (natural, "damping", 0.5, {}),
    (natural, "max_kl", 0.02, {"max_kl": 1.0}),
    (natural, "backtrack_factor", 0.5, {}),
    (natural, "penalty", 3.0, {"penalty": 1.0}),
    (natural, "warm_start", 0.5, {"warm_start": 1.0}),
    (natural, "lr", 0.5, {}),
    (newton, "radius", 0.25, {}),
    (newton, "damping", 0.5, {}),
    (newton, "gtol", 1e-9, {}),
    (newton, "metric_damping", 0.5, {"metric": "fisher"}),
    (newton, "damping_factor", 3.0, {"damping_factor": 2.0, "damping": 1.0}),
    (newton, "lr", 0.5, {}),
]


@pytest.mark.parametrize(("kind", "option", "value", "options"), WRITTEN)
def test_a_schedule_may_write_a_tensor(kind, option, value, options):
    after = []
    for written in (value, torch.tensor(value, dtype=torch.float64)):
        model, x, y = data(extra=(nn.Identity(),))
        optimizer = kind(model.parameters(), **options)
        optimizer.param_groups[0][option] = written
        for _ in range(2):
            optimizer.step(closure_of(model, x, y))
            optimizer.param_groups[0][option] = written
        after.append((optimizer.info, [p.detach() for p in model.parameters()]))
    (info, ours), (other, theirs) = after
    assert info == other
    assert all(map(torch.equal, ours, theirs))
