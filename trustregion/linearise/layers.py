"""Rules for whole layers: ``jvp`` is a closed form, ``vjp`` mostly calls the node itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import embedding, embedding_bag

from .rules import Rule, Site, Tangents, UnreadableGraph


class Softmax(Rule):
    """``softmax`` along a dimension, including slices in which every entry is masked."""

    fresh = True

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.p, self.dim = site.saved("result"), site.number("dim")

    def jvp(self, tangents: Tangents) -> Tensor:
        """Return ``p (t - p't)``."""
        pt = self.p * cast(Tensor, tangents[0])
        return pt.addcmul_(self.p, pt.sum(self.dim, keepdim=True), value=-1)


class LogSoftmax(Softmax):
    """``log_softmax`` along a dimension."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.p = self.p.exp()

    def jvp(self, tangents: Tangents) -> Tensor:
        """Return ``t - p't``."""
        t = cast(Tensor, tangents[0])
        return t - (self.p * t).sum(self.dim, keepdim=True)


class LogSumExp(Rule):
    """``log sum exp`` over dimensions, by which a Categorical normalizes its logits."""

    fresh = True

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        x, result, keep = site.saved("self"), site.outputs[0], site.number("keepdim")
        self.p = site.node(torch.ones(result.shape, dtype=x.dtype, device=x.device))
        self.reduced = {"dim": site.number("dim"), "keepdim": keep}
        self.kept = self.p.sum(site.number("dim"), keepdim=True).shape

    def jvp(self, tangents: Tangents) -> Tensor:
        """Return ``p't``, where ``p`` is the softmax."""
        return (self.p * cast(Tensor, tangents[0])).sum(**self.reduced)

    def vjp(self, cotangents: Tangents) -> Sequence[Tensor]:
        """Return ``p u``."""
        return (self.p * cast(Tensor, cotangents[0]).reshape(self.kept),)


class LayerNorm(Rule):
    """``w (x - mean) rstd + b`` over the last dimensions."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.fresh = site.needs[0] or site.needs[1]
        x, self.rstd = site.saved("input"), site.saved("result2")
        self.normal = (x - site.saved("result1")) * self.rstd
        self.weight = None if site.number("weight") is None else site.saved("weight")
        self.dims = list(range(-len(site.number("normalized_shape")), 0))

    def jvp(self, tangents: Tangents) -> Tensor:
        """Return the sum of the tangents from the input, the weight and the bias."""
        t, dw, db = tangents
        out = db
        if t is not None:
            along = (self.normal * t).mean(self.dims, keepdim=True)
            t = (t - t.mean(self.dims, keepdim=True)).addcmul_(self.normal, along, value=-1)
            t = t.mul_(self.rstd)
            t = t if self.weight is None else t.mul_(self.weight)
            out = t if out is None else t.add_(out)
        if dw is not None:
            out = self.normal * dw if out is None else torch.addcmul(out, self.normal, dw)
        return cast(Tensor, out).expand(self.site.outputs[0].shape)


class Convolution(Rule):
    """Convolutions of any dimension, plain or transposed."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.fresh = site.needs[0] or site.needs[1]
        self.input = site.saved("input") if site.needs[1] else None
        self.weight = site.saved("weight") if site.needs[0] else None
        names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
        self.arguments = [site.number(name) for name in names]

    def jvp(self, tangents: Tangents) -> Tensor:
        """Return the sum of the tangents from the input, the weight and the bias."""
        t, dw, db = tangents
        out = None
        for x, w in ((self.input, dw), (t, self.weight)):
            if x is not None and w is not None:
                term = torch.ops.aten.convolution.default(x, w, db, *self.arguments)
                out, db = term if out is None else out.add_(term), None
        if db is not None:  # Only the bias has a tangent.
            out = db.view(-1, *[1] * (len(self.site.outputs[0].shape) - 2))
        return cast(Tensor, out).expand(self.site.outputs[0].shape)


class MaxPool2d(Rule):
    """The maximum over windows of two dimensions."""

    fresh = True

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.indices = site.saved("result1")

    def jvp(self, tangents: Tangents) -> Tensor:
        """Return the tangent at the maximum of each window."""
        t = cast(Tensor, tangents[0])
        return t.flatten(-2).gather(-1, self.indices.flatten(-2)).view_as(self.indices)


class Embedding(Rule):
    """Rows of a table; the padding row has no gradient."""

    fresh = True

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        _require_plain(site)
        self.indices, padding = site.saved("indices"), site.number("padding_idx")
        self.padded = (self.indices == padding).unsqueeze(-1) if padding >= 0 else None

    def jvp(self, tangents: Tangents) -> Tensor:
        """Return the rows of the tangent."""
        out = embedding(self.indices, cast(Tensor, tangents[0]))
        return out if self.padded is None else out.masked_fill_(self.padded, 0.0)


class EmbeddingBag(Rule):
    """Sums or means of rows of a table, which torch itself can differentiate only once."""

    fresh = True

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        weights, padding = site.number("per_sample_weights"), site.number("padding_idx")
        self.bags = site.saved("indices"), site.saved("offsets")
        _require_plain(site)
        self.options = {
            "mode": ("sum", "mean", "max")[site.number("mode")],
            "per_sample_weights": None if weights is None else site.saved("per_sample_weights"),
            "padding_idx": padding if padding >= 0 else None,
            "include_last_offset": self.bags[1].numel() > site.outputs[0].shape[0],
        }
        if self.options["mode"] == "max" or site.needs[1:].count(True):
            raise UnreadableGraph(
                "EmbeddingBag cannot be differentiated twice, and can be linearised for fixed sums"
                " and means only"
            )

    def jvp(self, tangents: Tangents) -> Tensor:
        """Return the bags of the tangent."""
        indices, offsets = self.bags
        return embedding_bag(indices, cast(Tensor, tangents[0]), offsets, **self.options)


def _require_plain(site: Site) -> None:
    if site.number("scale_grad_by_freq"):
        raise UnreadableGraph(
            "scale_grad_by_freq scales the gradient of an embedding, so that it is no derivative"
        )


class Attention(Rule):
    """Fused scaled dot-product attention, which torch itself can differentiate only once.

    Each product computes the probabilities again, as the fused kernel does. The probabilities of a
    query are zero if the mask excludes every key.
    """

    fresh = True

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.q, self.k, self.v = (site.saved(name) for name in ("query", "key", "value"))
        scale = site.number("scale")
        self.scale = self.q.shape[-1] ** -0.5 if scale is None else scale
        self.mask = None if site.number("attn_mask") is None else site.saved("attn_mask")
        if site.number("is_causal"):
            shape = (self.q.shape[-2], self.k.shape[-2])
            above = torch.ones(shape, dtype=torch.bool, device=self.q.device).triu(1)
            self.mask = (
                torch.zeros(shape, device=self.q.device).to(self.q).masked_fill_(above, -torch.inf)
            )
        self.without_key = None
        if self.mask is not None and self.mask.numel():
            top = self.mask.amax(-1, keepdim=True)
            # Large finite entries absorb all scores of a row. The kernel's gradient is wrong there.
            drowned = top.isfinite() & (top < -1 / torch.finfo(top.dtype).eps)
            without_key = top == -torch.inf
            self.case = (bool(without_key.any()), bool(drowned.any()))
            self.without_key = without_key if self.case[0] else None

    def jvp(self, tangents: Tangents) -> Tensor:
        """Return the sum of the tangents from the queries, the keys and the values."""
        dq, dk, dv = tangents[:3]
        scores = self.scale * (self.q @ self.k.mT)
        p = torch.softmax(scores if self.mask is None else scores + self.mask, -1)
        if self.without_key is not None:
            p = p.masked_fill_(self.without_key, 0.0)
        pairs = ((dq, self.k), (self.q, dk))
        terms = [x @ y.mT for x, y in pairs if x is not None and y is not None]
        out = None if dv is None else p @ dv
        if terms:
            dp = p * (self.scale * (terms[0] if len(terms) == 1 else terms[0] + terms[1]))
            dp = dp.addcmul_(p, dp.sum(-1, keepdim=True), value=-1)
            out = dp @ self.v if out is None else out.add_(dp @ self.v)
        return cast(Tensor, out)
