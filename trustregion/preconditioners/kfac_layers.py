"""The dense and convolutional layers of a recorded graph: their inputs and their gradients."""

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

# Which input of a kind of node is a weight or a bias.
_WEIGHT = {"AddmmBackward0": 2, "MmBackward0": 1, "ConvolutionBackward0": 1}
_BIAS = {"AddmmBackward0": 0, "AddBackward0": 1, "ConvolutionBackward0": 2}
_CHUNK = 1 << 22  # entries of unfolded images at a time: 16 MiB in float32


@dataclass(frozen=True)
class Layer:
    """A layer ``y = W a + b`` of a recorded graph."""

    weight: int
    """The position of ``W`` among the parameters."""
    bias: int | None
    """The position of ``b``; None without a bias that is trained."""
    uses: tuple[Node, ...]
    """The nodes that multiplied by ``W``, one for each time that the layer ran."""

    @property
    def positions(self) -> list[int]:
        """The positions of ``W`` and of ``b``."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def kind(self) -> Hashable:
        """What the reading of the layer depends on, apart from its size."""
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
    """Return the layers of ``module`` whose products the graph of the outputs of ``A`` shows.

    A layer is left out if its weight entered something else as well, and a bias likewise. So is a
    layer that this release of torch does not let be read, or that is read wrongly: the first time
    that a kind of layer is met in a process, the gradient of its weight is computed from what was
    read, and compared with autograd.

    Raises:
        ValueError: none of the weights is a parameter of ``A``, or those that are do not enter a
            product that was recorded.
        UnreadableNode: the graph itself cannot be followed in this release of torch.

    """
    params, used = A.vector.params, set(A.used)
    index = {id(p): i for i, p in enumerate(params)}
    graph = _Graph.of(A.outputs)
    layers: dict[int, Layer] = {}  # by the weight, which two modules may share
    known = reached = False
    for layer in dense_layers(module):
        # not layer.weight, which a parametrisation would compute
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
    """The recorded graph, read from its leaves upwards."""

    leaves: dict[int, Node]
    """The node of each leaf tensor, by the tensor's id."""
    consumers: dict[Node, list[tuple[Node, int]]]
    """The nodes that each node enters, and as which input."""

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
        """Return the nodes that a leaf enters in the given way; none if it enters another too."""
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
    """What the node of a product saved.

    Attributes:
        input: the input of the layer.
        options: of a convolution; None for a product with a matrix.
        patch: the entries of one patch of a convolution.

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
    """Return whether a node is a product with a matrix, or a plain convolution, and can be read."""
    try:
        _read(node)
        if recorded.name(node) != "ConvolutionBackward0":
            return True
        return recorded.saved(node, "groups") == 1 and not recorded.saved(node, "transposed")
    except recorded.UnreadableNode:
        return False


def input_rows(node: Node) -> Iterator[Tensor]:
    """Yield the inputs of a product, one row for each row of its output."""
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


_AGREED: set[Hashable] = set()  # kinds of layers whose reading gave the gradients of autograd


@torch.no_grad()
def _agreeing(A: GaussNewtonOperator, layers: list[Layer]) -> list[Layer]:
    """Return the layers without those whose reading does not give the gradient of the weight.

    A bias of another gradient is left out of its layer.
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
    """Return the gradients of the weight and of the bias, flat, as the layer's reading has them.

    None where the inputs that were read do not fit the outputs.
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
    """Return the layer, without a bias that was read wrongly; None for a wrong weight."""
    if ours is None:
        return None
    gaps = [_gap(x, r) for x, r in zip(ours, exact, strict=False)]
    # A wrong reading is off by as much as the gradient itself. TF32 rounds by 1e-3, half precision
    # by less than this.
    units = (torch.finfo(_read(node).input.dtype).eps for node in layer.uses)
    tolerance = max(1e-2, *(10 * eps for eps in units))
    wrong = [tolerance < gap < math.inf for gap in gaps]
    if any(wrong[:1]):
        return None
    if any(wrong):
        return replace(layer, bias=None)
    if gaps and all(map(math.isfinite, gaps)):  # not where the gradients are zero or not finite
        _AGREED.add(layer.kind)
    return layer


def _gap(ours: Tensor, exact: Tensor | None) -> float:
    """Return the relative difference; NaN where it says nothing."""
    if exact is None:
        return math.nan
    size = norm(exact.reshape(-1))
    return norm(ours - exact.reshape(-1)) / size if size else math.nan
