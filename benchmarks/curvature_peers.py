"""Curvature products as others compute them in torch, on a model of ``curvature_models.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeAlias, cast

import torch
from backpack.hessianfree.ggnvp import ggn_vector_product
from curvlinops import FisherMCLinearOperator, GGNLinearOperator
from sb3_contrib import TRPO
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal, kl_divergence

import trustregion
from benchmarks.curvature_models import Model, mean_scale


@dataclass(frozen=True)
class Product:
    """A product with the curvature matrix of a model, ready to be taken."""

    run: Callable[[Tensor], Tensor]
    scales: bool = True
    """Whether the rows of the scales are in the matrix; if not, the vector ends before them."""
    factor: float = 1.0
    """What the product is multiplied with to get the one of the Fisher matrix."""
    sampled: bool = False
    """Whether the matrix is a random one, right in the mean only."""

    def domain(self, model: Model, v: Tensor) -> Tensor:
        """Return the part of a vector, or of a product, that the matrix knows."""
        return v if self.scales else v[: sum(p.numel() for p in model.net.parameters())]


Maker: TypeAlias = Callable[[Model], Product]


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def ours(model: Model, *, backend: str) -> Product:
    """The package's operator."""
    prediction = model.predict()
    return Product(trustregion.FisherOperator(prediction, model.parameters(), backend=backend).mv)


def ours_ggn(model: Model) -> Product:
    """The package's generalised Gauss-Newton matrix, of the loss that the peers get."""
    outputs = model.net(model.inputs)
    loss = _loss(model)(outputs, model.targets)
    H = trustregion.GGNOperator(loss, outputs, model.net.parameters())
    return Product(H.mv, scales=False, factor=mean_scale(model))


def ours_backend(model: Model) -> str:
    """Return which backend the package chooses."""
    return trustregion.FisherOperator(model.predict(), model.parameters()).backend


def _detached(prediction: Independent | Categorical) -> Distribution:
    if isinstance(prediction, Categorical):
        return Categorical(logits=prediction.logits.detach())
    normal = prediction.base_dist
    return Independent(Normal(normal.loc.detach(), normal.scale.detach()), 1)


def _kl_to_itself(model: Model) -> Tensor:
    new = model.predict()
    return kl_divergence(_detached(new), new).mean()


def kl_graph_kept(model: Model) -> Product:
    """KL double backward; one gradient call for all parameters, whose graph is kept."""
    params = model.parameters()
    kl_gradient = _flat(torch.autograd.grad(_kl_to_itself(model), params, create_graph=True))
    return Product(
        lambda v: _flat(torch.autograd.grad((kl_gradient * v).sum(), params, retain_graph=True))
    )


def kl_graph_rebuilt(model: Model) -> Product:
    """KL double backward that starts from the forward pass each time."""
    params = model.parameters()

    def product(v: Tensor) -> Tensor:
        kl_gradient = _flat(torch.autograd.grad(_kl_to_itself(model), params, create_graph=True))
        return _flat(torch.autograd.grad((kl_gradient * v).sum(), params))

    return Product(product)


def sb3_contrib(model: Model) -> Product:
    """The two methods of the installed TRPO, on the parameters of this model.

    Each parameter's gradient is a graph of its own. Its set-up takes the gradient of the objective
    in the same loop.
    """
    named = [(str(i), p) for i, p in enumerate(model.parameters())]
    agent = SimpleNamespace(policy=SimpleNamespace(named_parameters=lambda: named), cg_damping=0.0)
    new, targets = model.predict(), model.targets
    kl, objective = kl_divergence(_detached(new), new).mean(), new.log_prob(targets).mean()
    params, _, kl_gradient, _ = TRPO._compute_actor_grad(agent, kl, objective)  # type: ignore[arg-type]
    product = partial(TRPO.hessian_vector_product, agent, params, kl_gradient)  # type: ignore[arg-type]
    return Product(product)


def _loss(model: Model) -> nn.CrossEntropyLoss | nn.MSELoss:
    return nn.CrossEntropyLoss() if model.log_std is None else nn.MSELoss()


def _curvlinops(kind: Callable[..., Any], model: Model, **options: int) -> Any:
    return kind(
        model.net,
        _loss(model),
        list(model.net.parameters()),
        [(model.inputs, model.targets)],
        check_deterministic=False,
        num_data=len(model.inputs),
        **options,
    )


def curvlinops(model: Model) -> Product:
    """The generalised Gauss-Newton matrix: forward and reverse mode in each product."""
    A = _curvlinops(GGNLinearOperator, model)
    return Product(lambda v: cast("Tensor", A @ v), scales=False, factor=mean_scale(model))


def curvlinops_sampled(model: Model) -> Product:
    """The Fisher matrix of one drawn target a sample."""
    A = _curvlinops(FisherMCLinearOperator, model, mc_samples=1)
    return Product(
        lambda v: cast("Tensor", A @ v), scales=False, factor=mean_scale(model), sampled=True
    )


def backpack(model: Model) -> Product:
    """The generalised Gauss-Newton matrix on a kept forward pass: three double backwards."""
    outputs = model.net(model.inputs)
    loss = _loss(model)(outputs, model.targets)
    shapes = [p.shape for p in model.net.parameters()]
    sizes = [shape.numel() for shape in shapes]

    def product(v: Tensor) -> Tensor:
        parts = [part.view(s) for part, s in zip(v.split(sizes), shapes, strict=True)]
        return _flat(ggn_vector_product(loss, outputs, model.net, parts))

    return Product(product, scales=False, factor=mean_scale(model))


def gradient(model: Model) -> Callable[[], object]:
    """Return one forward and backward pass of the loss, the unit of a product's cost."""
    params, targets, loss = model.parameters(), model.targets, _loss(model)
    if model.log_std is not None:
        return lambda: torch.autograd.grad(-model.predict().log_prob(targets).mean(), params)
    return lambda: torch.autograd.grad(loss(model.net(model.inputs), targets), params)


MAKERS: dict[str, Maker] = {
    "ours": partial(ours, backend="auto"),
    "ours, backend graph": partial(ours, backend="graph"),
    "ours, GGNOperator": ours_ggn,
    "kl graph kept": kl_graph_kept,
    "kl graph rebuilt": kl_graph_rebuilt,
    "sb3-contrib": sb3_contrib,
    "curvlinops": curvlinops,
    "curvlinops, sampled Fisher": curvlinops_sampled,
    "BackPACK": backpack,
}


def check(model: Model, makers: dict[str, Maker] = MAKERS) -> Tensor:
    """Assert that all give the same product, and return it."""
    v = model.vector()
    Fv = makers["ours"](model).run(v)
    assert torch.isfinite(Fv).all()
    assert Fv.norm() > 0
    for name, maker in makers.items():
        agree(name, maker(model), model, Fv)
    return Fv


def agree(name: str, product: Product, model: Model, Fv: Tensor) -> None:
    """Assert that a product is ``Fv``, to 1e-3; a sampled one is so along ``v``, to a fifth."""
    v, Fv = product.domain(model, model.vector()), product.domain(model, Fv)
    theirs = product.factor * product.run(v)
    if product.sampled:
        assert abs((v @ theirs).item() / (v @ Fv).item() - 1) < 0.2, name
    else:
        assert (theirs - Fv).norm() < 1e-3 * Fv.norm(), name
