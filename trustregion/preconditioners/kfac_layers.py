"""The dense and convolutional layers of a recorded graph, with their inputs and gradients."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.functional import unfold

from .. import recorded
from ..autodiff import differentiate
from ..operators.gauss_newton import GaussNewtonOperator, Tensors
from ..recorded import Node
from ..vector import norm

# The position of the weight and of the bias among the inputs of each kind of node.
_WEIGHT = {"AddmmBackward0": 2, "MmBackward0": 1, "ConvolutionBackward0": 1}
_BIAS = {"AddmmBackward0": 0, "AddBackward0": 1, "ConvolutionBackward0": 2}
_CHUNK = 1 << 22  # entries of the images to unfold at a time: 16 MiB in float32


@dataclass(frozen=True)
class Layer:
    """A layer ``y = W a + b`` of a recorded graph."""

    weight: int
    """The position of ``W`` among the parameters."""
    bias: int | None
    """The position of ``b``; None without a bias that is trained."""
    uses: tuple[Node, ...]
    """The nodes of the products with ``W``, one for each time that the layer ran."""

    @property
    def positions(self) -> list[int]:
        """The positions of ``W`` and of ``b``."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def kind(self) -> Hashable:
        """The properties that reading the layer depends on, apart from its size."""
        options = []
        for node in self.uses:
            reading = _read(node)
            x = reading.input
            options.append((recorded.name(node), reading.options, x.dtype, x.device.type))
        return self.bias is None, frozenset(options)


def dense_layers(module: nn.Module) -> list[nn.Module]:
    """Return the layers of a module that have Kronecker factors."""
    return [layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]


def recorded_layers(module: nn.Module, A: GaussNewtonOperator) -> list[Layer]:
    """Return the layers of ``module`` whose products are in the graph of the outputs of ``A``.

    A layer is left out if its weight is used in any other operation, and a bias is left out of its
    layer for the same reason. A layer is also left out if it cannot be read in this release of
    torch, or if it is read incorrectly: the first time that a kind of layer occurs in a process,
    the gradient of its weight is computed from what was read, and compared with autograd.

    Raises:
        ValueError: none of the weights is a parameter of ``A``, or none of these is in a recorded
            product.
        UnreadableNode: the graph cannot be traversed in this release of torch.

    """
    params, used = A.vector.params, set(A.used)
    index = {id(p): i for i, p in enumerate(params)}
    graph = _Graph.of(A.outputs)
    layers: dict[int, Layer] = {}  # by the weight, which two modules may share
    known = reached = False
    for layer in dense_layers(module):
        # layer.weight would be computed by a parametrization
        weight, bias = (index.get(id(layer._parameters.get(name))) for name in ("weight", "bias"))
        known = known or weight is not None
        if weight is None or weight not in used:
            continue
        reached = True
        uses = graph.uses(params[weight], _WEIGHT, transposed=isinstance(layer, nn.Linear))
        if not uses or not all(map(_is_readable, uses)):
            continue
        if bias is not None and len(graph.uses(params[bias], _BIAS)) != len(uses):
            bias = None
        layers.setdefault(weight, Layer(weight, bias, tuple(uses)))
    if not known:
        raise ValueError(
            "none of the weights of the module's Linear and Conv2d layers is among the parameters"
            " of the operator: give KFAC the module whose parameters are trained. An operator that"
            " from_function made has leaves of its own: make it from the outputs of the module and"
            " module.parameters() instead"
        )
    agreeing = _agreeing(A, list(layers.values()))
    if reached and not agreeing:
        raise ValueError(
            "the graph of the operator's outputs shows no product with the weight of a Linear or"
            " Conv2d layer of the module: KFAC reads the graph of a plain forward pass, without"
            " torch.compile, of layers that are not grouped or transposed; make an operator that"
            " from_function made with backend='functional' from the outputs of the module instead"
        )
    return agreeing


@dataclass(frozen=True)
class _Graph:
    """The recorded graph, from the leaves to the outputs."""

    leaves: dict[int, Node]
    """The node of each leaf tensor, by the id of the tensor."""
    consumers: dict[Node, list[tuple[Node, int]]]
    """The nodes that use each node, and the position of their input."""

    @classmethod
    def of(cls, outputs: Tensors) -> _Graph:
        leaves: dict[int, Node] = {}
        consumers: dict[Node, list[tuple[Node, int]]] = {}
        stack = [cast(Node, y.grad_fn) for y in outputs if y.grad_fn is not None]
        seen = set(stack)
        while stack:
            node = stack.pop()
            leaf = recorded.leaf(node)
            if leaf is not None:
                leaves[id(leaf)] = node
            for slot, (source, _) in enumerate(recorded.sources(node)):
                if source is None:
                    continue
                consumers.setdefault(source, []).append((node, slot))
                if source not in seen:
                    seen.add(source)
                    stack.append(source)
        return cls(leaves, consumers)

    def uses(self, p: Tensor, slots: dict[str, int], *, transposed: bool = False) -> list[Node]:
        """Return the nodes that use a leaf at the given inputs; none if any other node uses it."""
        found: list[Node] = []
        stack = [(self.leaves.get(id(p)), False)]
        while stack:
            source, turned = stack.pop()
            for node, slot in self.consumers.get(source, ()):
                name = recorded.name(node)
                if name == "ToCopyBackward0":  # the cast of autocast
                    stack.append((node, turned))
                elif name == "TBackward0":
                    stack.append((node, not turned))
                elif slots.get(name) == slot and turned == (transposed and name in _MATMUL):
                    found.append(node)
                else:
                    return []
        return found


_MATMUL = ("AddmmBackward0", "MmBackward0")


@dataclass(frozen=True)
class _Reading:
    """The values that the node of a product saved.

    Attributes:
        input: the input of the layer.
        options: the options of a convolution; None for a product with a matrix.
        patch: the number of entries in a patch of a convolution.

    """

    input: Tensor
    options: tuple[tuple[str, tuple[int, ...]], ...] | None = None
    patch: int = 0


def _read(node: Node) -> _Reading:
    kind = recorded.name(node)
    if kind != "ConvolutionBackward0":
        return _Reading(recorded.saved(node, "mat1" if kind == "AddmmBackward0" else "self"))
    weight = recorded.saved(node, "weight")
    options = {
        name: tuple(recorded.saved(node, name)) for name in ("dilation", "padding", "stride")
    }
    options["kernel_size"] = tuple(weight.shape[2:])
    return _Reading(recorded.saved(node, "input"), tuple(options.items()), weight[0].numel())


def _is_readable(node: Node) -> bool:
    """Return whether a node is a readable product with a matrix or ungrouped convolution."""
    try:
        _read(node)
        if recorded.name(node) != "ConvolutionBackward0":
            return True
        return recorded.saved(node, "groups") == 1 and not recorded.saved(node, "transposed")
    except recorded.UnreadableNode:
        return False


def input_rows(node: Node) -> Iterator[Tensor]:
    """Yield the inputs of a product in chunks, with one row for each row of its output."""
    reading = _read(node)
    if reading.options is None:
        yield reading.input
        return
    x, options = reading.input, dict[str, Any](reading.options)
    entries = reading.patch * x[0, 0].numel()  # for one image, at a stride of one
    for part in x.split(max(1, _CHUNK // max(1, entries))):
        yield unfold(part, **options).transpose(0, 1).flatten(1).T


def gradient_rows(g: Tensor) -> Tensor:
    """Return the gradient at an output as rows: ``(N, out, h, w)`` of a convolution as N h w."""
    return g.transpose(0, 1).flatten(1).T if g.ndim == 4 else g


_AGREED: set[Hashable] = set()  # kinds of layers that agreed with autograd


@torch.no_grad()
def _agreeing(A: GaussNewtonOperator, layers: list[Layer]) -> list[Layer]:
    """Return the layers for which what was read gives the gradient of the weight.

    A bias for which it does not is left out of its layer.
    """
    unknown = [layer for layer in layers if layer.kind not in _AGREED]
    if not unknown:
        return layers
    generator = torch.Generator().manual_seed(0)
    ys = [y for y in A.outputs if y.requires_grad]
    u = [torch.randn(y.shape, generator=generator, device="cpu").to(y) for y in ys]
    nodes = [node for layer in unknown for node in layer.uses]
    positions = [i for layer in unknown for i in layer.positions]
    edges = cast("list[Tensor]", [GradientEdge(node, 0) for node in nodes])
    grads = differentiate(ys, [*edges, *(A.vector.params[i] for i in positions)], u)
    at_outputs = dict(zip(nodes, grads[: len(nodes)], strict=True))
    exact = dict(zip(positions, grads[len(nodes) :], strict=True))
    checked: dict[int, Layer | None] = {}
    for layer in unknown:
        ours = _read_gradients(layer, at_outputs)
        checked[layer.weight] = _confirmed(layer, ours, [exact[i] for i in layer.positions])
    kept = (checked.get(layer.weight, layer) for layer in layers)
    return [layer for layer in kept if layer is not None]


def _read_gradients(layer: Layer, at_outputs: dict[Node, Tensor | None]) -> list[Tensor] | None:
    """Return the flat gradients of the weight and the bias, computed from what was read.

    Return None if the numbers of rows of the inputs and the outputs differ.
    """
    weights, biases = [], []
    for node in layer.uses:
        g = at_outputs[node]
        if g is None:
            continue
        rows, start = gradient_rows(g), 0
        for a in input_rows(node):
            if start + len(a) > len(rows):
                return None
            weights.append((rows[start : start + len(a)].T @ a).double().flatten())
            start += len(a)
        if start != len(rows):
            return None
        biases.append(rows.sum(0).double())
    return [torch.stack(parts).sum(0) for parts in (weights, biases) if parts]


def _confirmed(layer: Layer, ours: list[Tensor] | None, exact: list[Tensor | None]) -> Layer | None:
    """Return the layer, without an incorrect bias, or None for an incorrect weight."""
    if ours is None:
        return None
    gaps = [_gap(x, r) for x, r in zip(ours, exact, strict=False)]
    # An incorrect reading has an error of the size of the gradient; the rounding errors of TF32
    # are 1e-3, those of half precision below 10 eps.
    units = (torch.finfo(_read(node).input.dtype).eps for node in layer.uses)
    tolerance = max(1e-2, *(10 * eps for eps in units))
    wrong = [tolerance < gap < math.inf for gap in gaps]
    if any(wrong[:1]):
        return None
    if any(wrong):
        return replace(layer, bias=None)
    if gaps and all(map(math.isfinite, gaps)):  # conclusive: neither zero nor nonfinite
        _AGREED.add(layer.kind)
    return layer


def _gap(ours: Tensor, exact: Tensor | None) -> float:
    """Return the relative difference; NaN if there is nothing to compare with."""
    if exact is None:
        return math.nan
    size = norm(exact.reshape(-1))
    return norm(ours - exact.reshape(-1)) / size if size else math.nan
