"""The fast path: small tanh networks computed by numpy. No other file knows of it.

Most policies and critics of this package are a few linear and tanh layers. For the few rows that a
step of some environments or a minibatch has, calling torch and its automatic differentiation takes
several times what the arithmetic does. Each function here does what its torch form does, up to
rounding, and returns the torch form where a network is anything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from .critic import Critic
from .encoders import Encoder
from .heads import ActionHead, CategoricalHead, GaussianHead
from .moments import ObservationNorm
from .policy import HeadPolicy, Policy

Array: TypeAlias = np.ndarray
Actor: TypeAlias = Callable[[int, Array], Array]
"""Actions ``(N, ...)`` of step ``t`` from its rows of observations ``(N, d)``."""


def actor(policy: Policy, noise: Tensor) -> Actor:
    """Return what acts at the steps of a rollout as ``policy.act`` does.

    Args:
        policy: its parameters are read now.
        noise: what ``policy.noise`` returned for the rollout, one row per step.

    """
    if type(policy) is HeadPolicy and policy.columns is None:
        twin = _twin(policy)
        if twin is not None:
            draw = _drawer(policy.head, noise)
            return lambda t, rows: draw(t, twin(rows))
    device = next((p.device for p in policy.parameters()), torch.device("cpu"))
    noise = noise.to(device)

    @torch.inference_mode()
    def act(t: int, rows: Array) -> Array:
        return policy.act(torch.from_numpy(rows).to(device), noise[t]).cpu().numpy()

    return act


def distribution_function(policy: Policy) -> Callable[[Tensor], Distribution]:
    """Return a function that gives the distribution of rows ``(B, d)``, without a gradient."""
    if type(policy) is HeadPolicy and policy.columns is None:
        twin, head = _twin(policy), policy.head
        if twin is not None:
            return lambda rows: head(torch.from_numpy(twin(rows.numpy())))
    return policy


def value_function(critic: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a function that gives the values of rows ``(..., d)``, without a gradient."""
    twin = _twin(critic) if type(critic) is Critic else None
    if twin is None:
        return critic

    def values(rows: Tensor) -> Tensor:
        flat = rows.reshape(-1, rows.shape[-1]).numpy()
        return torch.from_numpy(twin(flat)).reshape(rows.shape[:-1])

    return values


def squared_error(
    critic: nn.Module, x: nn.Parameter, parameters: Sequence[nn.Parameter], rows: Tensor
) -> tuple[Tensor, Callable[[Tensor, Tensor], float]]:
    r"""Return inputs and :math:`E[(V - R)^2]` as a function of some of them and their targets.

    Each call reads the parameters from ``x`` and writes the gradient to ``x.grad``, which stays the
    same tensor. The inputs are the rows, or what the layers below these parameters make of them,
    which is computed once.

    Args:
        critic: rows ``(B, d)`` to values ``(B,)``.
        x: the values of ``parameters``, one after the other, ``(n,)``.
        parameters: the critic's parameters to differentiate by.
        rows: of observations, ``(B, d)``.

    """
    gradient = x.grad = torch.zeros_like(x)
    twin = _twin(critic) if type(critic) is Critic else None
    if twin is not None:
        frozen, fitted = twin.split({id(p) for p in parameters})
        held = [p for layer in fitted.layers for p in layer.module.parameters()]
        if list(map(id, held)) == list(map(id, parameters)):
            return torch.from_numpy(frozen(rows.numpy())), _error_at(fitted.layers, x, gradient)
    names = {id(p): name for name, p in critic.named_parameters()}
    keys, shapes = [names[id(p)] for p in parameters], [p.shape for p in parameters]
    sizes = [p.numel() for p in parameters]

    def error(inputs: Tensor, targets: Tensor) -> float:
        parts = x.split(sizes)
        values = {k: part.view(s) for k, part, s in zip(keys, parts, shapes, strict=True)}
        predicted = torch.func.functional_call(critic, values, (inputs,))
        loss = (predicted - targets).square().mean()
        gradient.copy_(torch.autograd.grad(loss, [x])[0])
        return loss.item()

    return rows, error


def adam_step(optimizer: torch.optim.Adam, x: nn.Parameter) -> Callable[[], object]:
    """Return a function that does as ``optimizer.step``: Kingma and Ba, Adam, 2015, algorithm 1.

    Args:
        optimizer: of ``x`` alone.
        x: its gradient tensor is used from now on.

    """
    (group,), state = optimizer.param_groups, optimizer.state[x]
    others = any(group[name] for name in ("weight_decay", "amsgrad", "maximize"))
    if not state or x.grad is None or others or not _plain(x):  # the first step makes the state
        return optimizer.step
    tensors = x.detach(), x.grad, state["exp_avg"], state["exp_avg_sq"], state["step"]
    values, gradient, mean, square, count = (tensor.numpy() for tensor in tensors)
    (beta1, beta2), lr, eps = group["betas"], group["lr"], group["eps"]
    spare = np.empty_like(gradient)

    @np.errstate(all="ignore")  # the caller looks at the error
    def step() -> None:
        count[()] += 1
        t = float(count)
        np.multiply(mean, beta1, out=mean)
        np.add(mean, np.multiply(gradient, 1 - beta1, out=spare), out=mean)
        np.multiply(square, beta2, out=square)
        np.multiply(np.square(gradient, out=spare), 1 - beta2, out=spare)
        np.add(square, spare, out=square)
        np.multiply(np.sqrt(square, out=spare), 1 / math.sqrt(1 - beta2**t), out=spare)
        np.divide(mean, np.add(spare, eps, out=spare), out=spare)
        np.multiply(spare, lr / (1 - beta1**t), out=spare)
        np.subtract(values, spare, out=values)

    return step


@dataclass(frozen=True, eq=False)
class _Layer:
    """A linear layer, and perhaps a tanh after it; its arrays share the module's memory."""

    module: nn.Linear
    weight: Array
    bias: Array
    tanh: bool

    def __call__(self, x: Array) -> Array:
        x = np.dot(x, self.weight.T)  # half a microsecond less than @
        x += self.bias
        return np.tanh(x, out=x) if self.tanh else x


@dataclass(frozen=True, eq=False)
class _Network:
    """A function of rows ``(B, d)``: a normalisation, then layers."""

    prepare: Callable[[Array], Array] | None
    layers: tuple[_Layer, ...]

    def __call__(self, x: Array) -> Array:
        if self.prepare is not None:
            x = self.prepare(x)
        for layer in self.layers:
            x = layer(x)
        return x

    def split(self, wanted: set[int]) -> tuple[_Network, _Network]:
        """Return the layers before the first with any of some parameters, and the others."""
        has = [any(id(p) in wanted for p in la.module.parameters()) for la in self.layers]
        first = has.index(True) if any(has) else len(has)
        return _Network(self.prepare, self.layers[:first]), _Network(None, self.layers[first:])


def _error_at(
    layers: Sequence[_Layer], x: Tensor, grad: Tensor
) -> Callable[[Tensor, Tensor], float]:
    """Return the mean squared error of layers at parameters ``x``, whose gradient goes to ``grad``.

    Its arrays are kept from call to call: new ones of this size come with page faults, which take
    as long as the arithmetic.
    """
    sizes = [array.size for layer in layers for array in (layer.weight, layer.bias)]
    values, slopes = ([part.numpy() for part in v.split(sizes)] for v in (x.detach(), grad))
    weights, weight_grads = (
        [part.reshape(la.weight.shape) for part, la in zip(v[::2], layers, strict=True)]
        for v in (values, slopes)
    )
    biases, bias_grads = values[1::2], slopes[1::2]

    @cache
    def buffers(size: int) -> tuple[list[Array], list[Array], Array]:
        shapes = [(size, bias.size) for bias in biases]
        outputs, deltas = ([np.empty(shape, np.float32) for shape in shapes] for _ in range(2))
        return outputs, deltas, np.ones(size, np.float32)

    @np.errstate(all="ignore")  # the caller looks at the error
    def error(inputs: Tensor, targets: Tensor) -> float:
        rows, n = inputs.numpy(), len(inputs)
        outputs, deltas, ones = buffers(n)
        for k, layer in enumerate(layers):
            y = np.dot(outputs[k - 1] if k else rows, weights[k].T, out=outputs[k])
            y += biases[k]
            if layer.tanh:
                np.tanh(y, out=y)
        residual = outputs[-1][:, 0] - targets.numpy()
        np.multiply(residual[:, None], np.float32(2 / n), out=deltas[-1])
        for k in reversed(range(len(layers))):
            delta = deltas[k]
            if layers[
                k
            ].tanh:  # its derivative takes the place of the output, used for the last time
                derivative = np.square(outputs[k], out=outputs[k])
                delta *= np.subtract(1, derivative, out=derivative)
            np.dot(delta.T, outputs[k - 1] if k else rows, out=weight_grads[k])
            np.dot(ones, delta, out=bias_grads[k])
            if k:
                np.dot(delta, weights[k], out=deltas[k - 1])
        return float(residual @ residual) / n

    return error


def _twin(network: HeadPolicy | Critic) -> _Network | None:
    """Return the encoder and the linear layer of a network, if all is plain; otherwise None.

    Plain are float32 linear layers on the CPU, each with a tanh after it or without. Forward hooks
    are not: torch calls them, and pruning and weight normalisation set the weights in one.
    """
    encoder = network.encoder
    if type(encoder) is not Encoder or not encoder.whole:
        return None
    norm = encoder.norm
    if type(norm) not in (ObservationNorm, type(None)):
        return None
    stages = (encoder.body, network.linear)
    modules = [m for s in stages for m in (s if isinstance(s, nn.Sequential) else [s])]
    called = (network, encoder, *stages, *modules, *([] if norm is None else [norm]))
    if any(m._forward_pre_hooks or m._forward_hooks for m in called):
        return None
    layers: list[_Layer] = []
    for module in modules:
        if type(module) is nn.Linear and _plain(module.weight, module.bias):
            arrays = module.weight.detach().numpy(), module.bias.detach().numpy()
            layers.append(_Layer(module, *arrays, tanh=False))
        elif type(module) is nn.Tanh and layers and not layers[-1].tanh:
            last = layers.pop()
            layers.append(_Layer(last.module, last.weight, last.bias, tanh=True))
        else:
            return None
    return _Network(_normaliser(norm), tuple(layers))


def _plain(*tensors: Tensor | None) -> bool:
    return all(
        t is not None and t.dtype is torch.float32 and t.device.type == "cpu" for t in tensors
    )


def _normaliser(norm: ObservationNorm | None) -> Callable[[Array], Array] | None:
    if norm is None:
        return None
    shift, scale, clip = norm.shift.numpy(), norm.scale.numpy(), norm.clip

    def normalise(x: Array) -> Array:
        centred = x - shift
        centred *= scale
        return centred.clip(-clip, clip, out=centred)

    return normalise


def _drawer(head: ActionHead, noise: Tensor) -> Actor:
    """Return what draws the actions of each step from outputs, as ``head.draw`` does."""
    if type(head) is CategoricalHead:
        gumbel = noise.numpy()
        return lambda t, outputs: (outputs + gumbel[t]).argmax(-1)
    if type(head) is GaussianHead and head.log_std is not None:
        deviations = (head.log_std.detach().exp() * noise).numpy()
        return lambda t, means: means + deviations[t]
    return lambda t, outputs: head.draw(torch.from_numpy(outputs), noise[t]).detach().numpy()
