"""The rule of each node of the autograd graph, by the name of the node."""

from __future__ import annotations

from .. import recorded
from ..autodiff import explanation, out_of_memory
from . import onednn
from .arithmetic import FACTORS, Elementwise, MatrixProduct, Product, Sum
from .layers import (
    Attention,
    Convolution,
    Embedding,
    EmbeddingBag,
    LayerNorm,
    LogSoftmax,
    LogSumExp,
    MaxPool2d,
    Softmax,
)
from .rules import Rule, Site, UnreadableGraph
from .shapes import Expand, Permute, Reshape, Same, Select, Transpose

_RESHAPES = ("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze")
_FUNCTIONS = (
    "Tanh", "Sigmoid", "Relu", "LeakyRelu", "Elu", "Gelu", "Silu", "Mish", "Softplus", "Hardtanh",
    "Hardswish", "Hardsigmoid", "LogSigmoid", "Exp", "Expm1", "Log", "Log1p", "Sqrt", "Rsqrt",
    "Sin", "Cos", "Abs", "Neg", "Erf", "Atan", "Reciprocal", "ClampMin", "ClampMax", "Pow",
)  # fmt: skip
_RULES: dict[str, type[Rule]] = {
    **{f"{name}Backward{i}": Reshape for name in _RESHAPES for i in range(3)},
    **{f"{name}Backward0": Elementwise for name in _FUNCTIONS},
    # by a number
    **dict.fromkeys(
        ("MulBackward1", "DivBackward1", "RsubBackward1", "ClampBackward1"), Elementwise
    ),
    **dict.fromkeys(("AddBackward1", "SubBackward1"), Same),
    **dict.fromkeys(("AddBackward0", "SubBackward0"), Sum),
    **dict.fromkeys(FACTORS, MatrixProduct),
    "MulBackward0": Product,
    "TBackward0": Transpose,
    "TransposeBackward0": Permute,
    "PermuteBackward0": Permute,
    "ExpandBackward0": Expand,
    "CloneBackward0": Same,
    "AliasBackward0": Same,
    "ToCopyBackward0": Same,
    "SelectBackward0": Select,
    "SoftmaxBackward0": Softmax,
    "SafeSoftmaxBackward0": Softmax,
    "LogSoftmaxBackward0": LogSoftmax,
    "LogsumexpBackward0": LogSumExp,
    "NativeLayerNormBackward0": LayerNorm,
    "ConvolutionBackward0": Convolution,
    "MaxPool2DWithIndicesBackward0": MaxPool2d,
    "EmbeddingBackward0": Embedding,
    "EmbeddingBagBackward0": EmbeddingBag,
    "ScaledDotProductFlashAttentionForCpuBackward0": Attention,
}


def rule_for(site: Site) -> Rule:
    """Return the rule of a node; the general rule if the special one rejects the node.

    Raises:
        UnreadableGraph: no rule is right for the node.

    """
    kind = _RULES.get(recorded.name(site.node), Rule)
    if kind is MatrixProduct and onednn.fits(site):
        kind = onednn.DenseProduct
    try:
        return kind(site)
    except UnreadableGraph:
        raise
    except Exception as error:  # The node differs from those that the rule was written for.
        if out_of_memory(error) or explanation(error):  # No other rule can read a freed graph.
            raise
        return Rule(site)
