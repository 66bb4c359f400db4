"""What a recorded graph knows of its dense and convolutional layers: their inputs and gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.functional import pad, unfold

from ..arguments import REAL
from ..autodiff import differentiate
from ..operators.gauss_newton import GaussNewtonOperator, Tensors
from ..vector import exponent, ldexp

Node: TypeAlias = Any  # a node of the autograd graph; what it saved has no static type

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
    """That of ``b``; None without a bias that is trained."""
    uses: tuple[Node, ...]
    """The nodes that multiplied by ``W``, one for each time that the layer ran."""


@dataclass(frozen=True)
class Factors:
    r"""The factors of :math:`A \otimes G`, which stands for a block of the curvature.

    In float64 on the CPU, where the eigenvectors of such small matrices are found fastest.
    """

    A: Tensor
    """The weighted mean of ``a a'`` over all rows, with a 1 behind ``a`` where there is a bias."""
    G: Tensor
    """The sum of ``g g'`` over all rows, divided by the number of samples."""
    rows: int
    """Samples, times the positions of each, times the uses of the layer."""


def dense_layers(module: nn.Module) -> list[nn.Module]:
    """Return the layers of a module that have Kronecker factors."""
    return [layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]


def recorded_layers(module: nn.Module, A: GaussNewtonOperator) -> list[Layer]:
    """Return the layers of ``module`` whose work the graph of the outputs of ``A`` shows.

    A layer is left out if its weight entered something else as well, and a bias likewise.

    Raises:
        ValueError: none of the weights is a parameter of ``A``, or those that are do not enter a
            product that was recorded.

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
        if not uses or not all(_is_plain(node) for node in uses):
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
    if reached and not layers:
        raise ValueError(
            "the graph of the operator's outputs shows no product with the weight of a Linear or"
            " Conv2d layer of the module: KFAC reads the graph of a plain forward pass, without"
            " torch.compile, of layers that are not grouped or transposed; make an operator that"
            " from_function made with backend='functional' from the outputs of the module instead"
        )
    return list(layers.values())


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
        stack: list[Node] = [y.grad_fn for y in outputs if y.grad_fn is not None]
        seen = set(stack)
        while stack:
            node = stack.pop()
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                leaves[id(leaf)] = node
            for slot, (source, _) in enumerate(node.next_functions):
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
                name = node.name()
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


def _is_plain(node: Node) -> bool:
    if node.name() != "ConvolutionBackward0":
        return True
    return node._saved_groups == 1 and not node._saved_transposed


@torch.no_grad()
def measure(
    A: GaussNewtonOperator,
    layers: Sequence[Layer],
    cotangents: Iterable[Tensors],
    weights: Tensor | None = None,
) -> list[Factors]:
    """Return the factors of each layer, from one backward pass for each of the ``cotangents``.

    A row of ``g`` is the gradient at the output of the layer for one sample, one position and one
    use, and a row of ``a`` the input there. ``weights`` are those of the samples, which rows of
    ``a`` take; the ``cotangents`` hold them already, so that a row of ``g`` is only left out where
    its weight is 0. Rows that show another order than that of the samples count equally.
    """
    if not layers:
        return []
    nodes, grams, shares = [], {}, dict[Node, Tensor | None]()
    for layer in layers:
        out = A.vector.params[layer.weight].shape[0]
        nodes += layer.uses
        grams.update(
            dict.fromkeys(layer.uses, torch.zeros(out, out, dtype=torch.float64, device="cpu"))
        )
    edges = cast("list[Tensor]", [GradientEdge(node, 0) for node in nodes])
    active = [k for k, y in enumerate(A.outputs) if y.requires_grad]
    ys = [A.outputs[k] for k in active]
    for u in cotangents:
        for node, g in zip(nodes, differentiate(ys, edges, [u[k] for k in active]), strict=True):
            if g is not None:
                rows = _gradient_rows(g)
                share = shares.setdefault(node, _shares(weights, len(rows)))
                if share is not None:
                    left_out = rows[share == 0]
                    if bool((left_out.isfinite() & (left_out != 0)).any()):
                        shares[node] = None
                    else:
                        rows = rows[share > 0]
                grams[node] = grams[node] + _gram(rows)
    factors = []
    for layer in layers:
        parts = [_moments(node, shares.get(node)) for node in layer.uses]
        moments = torch.stack([part for part, _ in parts]).sum(0)
        G = torch.stack([grams[node] for node in layer.uses]).sum(0) / A.total
        size = len(moments) if layer.bias is not None else len(moments) - 1
        mean = moments[:size, :size] / moments[-1, -1]
        factors.append(Factors(mean, G, sum(count for _, count in parts)))
    return factors


def _shares(weights: Tensor | None, rows: int) -> Tensor | None:
    """Return the weight of each row, sample by sample; None where the number does not fit."""
    while weights is not None:
        if rows % weights.numel() == 0:
            return weights.reshape(-1).repeat_interleave(rows // weights.numel())
        weights = weights.sum(-1) if weights.ndim > 1 else None  # a layer behind a pool
    return None


def _gradient_rows(g: Tensor) -> Tensor:
    """Return the gradient at an output as rows: ``(N, out, h, w)`` of a convolution as N h w."""
    return g.transpose(0, 1).flatten(1).T if g.ndim == 4 else g


def _moments(node: Node, share: Tensor | None) -> tuple[Tensor, int]:
    """Return the weighted sum of ``a a'`` over the rows of the input, and their number.

    Each row ``a`` has a 1 behind it.
    """
    total, count = torch.zeros((), dtype=torch.float64, device="cpu"), 0
    for a in _input_rows(node):
        rows = _real(a)
        size = torch.ones(len(rows), 1, dtype=torch.float64, device=rows.device)
        count += len(rows)
        if share is not None:
            part = share[count - len(rows) : count]
            size = part[part > 0].sqrt().unsqueeze(1)
            rows = rows[part > 0] * size.to(rows)
        K = pad(_gram(rows), (0, 1, 0, 1))
        K[-1, :-1] = K[:-1, -1] = (size.to(rows).T @ rows).squeeze(0).double().cpu()
        K[-1, -1] = size.square().sum().cpu()
        total = total + K
    return total, count


def _input_rows(node: Node) -> Iterator[Tensor]:
    """Yield the inputs of a product, one row for each row of its output."""
    if node.name() != "ConvolutionBackward0":
        yield node._saved_mat1 if node.name() == "AddmmBackward0" else node._saved_self
        return
    x, weight = node._saved_input, node._saved_weight
    options = {
        "kernel_size": weight.shape[2:],
        "dilation": node._saved_dilation,
        "padding": node._saved_padding,
        "stride": node._saved_stride,
    }
    patch = weight[0].numel() * x[0, 0].numel()  # entries for one image, at a stride of one
    for part in x.split(max(1, _CHUNK // max(1, patch))):
        yield unfold(part, **options).transpose(0, 1).flatten(1).T


def _gram(rows: Tensor) -> Tensor:
    """Return ``X'X`` of rows ``X`` in float64 on the CPU, whatever their scale."""
    X = _real(rows)
    K = (X.T @ X).double().cpu()
    size, info = K.trace().item() / max(1, X.numel()), torch.finfo(X.dtype)
    # unless the mean square is so far from the ends of the range that no square has left it
    if not math.sqrt(info.tiny) < size < math.sqrt(info.max):
        e = exponent(X)
        if e is None or not math.isfinite(X.abs().max().item()):
            return K
        X = ldexp(X, -e)
        K = ldexp((X.T @ X).double().cpu(), 2 * e)
    return K


def _real(X: Tensor) -> Tensor:
    """Return a tensor that autocast made in float32."""
    return X if X.dtype in REAL else X.float()
