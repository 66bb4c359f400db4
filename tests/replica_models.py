"""Models of test_replicas.py: rows -> network, closure, and the prediction for fewer rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal
from torch.nn.functional import mse_loss

from trustregion import Weighted

SAMPLES = 100


def network(outputs: int) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs))
    return net.double()


def data(rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return inputs, classes, targets and weights of some of the samples."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 4, generator=draw, dtype=torch.float64)
    map_, noise = torch.randn(4, 3, generator=draw), torch.randn(SAMPLES, generator=draw)
    scores = x @ map_.double()
    targets = scores[:, 0].sin() + 0.3 * noise.double()
    weights = torch.rand(SAMPLES, generator=draw).double()
    weights[::7] = 0.0
    return tuple(t[rows] for t in (x, scores.argmax(1), targets, weights))  # type: ignore


def classes(rows: slice, *, weighted: bool = False, constrained: float | None = None):
    net, (x, y, _, weights) = network(3), data(rows)

    def closure():
        prediction = Categorical(logits=net(x))
        losses = -prediction.log_prob(y)
        if weighted:
            return (weights @ losses) / weights.sum(), Weighted(prediction, weights)
        if constrained is not None:
            share = prediction.probs[:, 0].mean()  # type: ignore
            return losses.mean(), prediction, torch.stack([share - constrained, share - 0.9])
        return losses.mean(), prediction

    few = max(0, 40 - (rows.start or 0))  # another share than that of the samples
    return net, closure, lambda: Categorical(logits=net(x[:few]))


def normal(rows: slice):
    net, (x, _, y, _) = network(2), data(rows)

    def closure():
        mean, log_std = net(x).unbind(1)
        prediction = Normal(mean, log_std.exp())
        return -prediction.log_prob(y).mean(), prediction

    return net, closure, None


def joint(rows: slice):
    net, (x, y, targets, _) = network(4), data(rows)

    def closure():
        out = net(x)
        action, value = Categorical(logits=out[:, :3]), Independent(Normal(out[:, 3:], 1.0), 1)
        loss = -action.log_prob(y) - value.log_prob(targets[:, None])
        return loss.mean(), {"action": action, "value": value}

    return net, closure, None


def squares(rows: slice):
    net, (x, _, y, _) = network(1), data(rows)

    def closure():
        out = net(x)
        return mse_loss(out[:, 0], y), out

    return net, closure, None


def loss_alone(rows: slice):
    net, closure, _ = squares(rows)
    return net, lambda: closure()[0], None


def experts(rows: slice):
    """Two networks; the second sees the samples from 30 on, which the first process has not."""
    net, (x, y, _, _) = nn.ModuleList([network(3), network(3)]), data(rows)
    first = max(0, 30 - (rows.start or 0))

    def closure():
        parts = (net[0](x[:first]), net[1](x[first:]))
        prediction = Categorical(logits=torch.cat([part for part in parts if len(part)]))
        return -prediction.log_prob(y).mean(), prediction

    return net, closure, None


MODELS: dict[str, Callable[[slice], Any]] = {
    "classes": classes,
    "weighted": partial(classes, weighted=True),
    "kept": partial(classes, constrained=0.4),
    "violated": partial(classes, constrained=0.1),
    "normal": normal,
    "joint": joint,
    "squares": squares,
    "loss_alone": loss_alone,
    "experts": experts,
}
