"""Linearize torch's own database of operators, and print the outcome of each as JSON.

This is a separate program because importing the database turns off torch's global flags and loads
another profile of Hypothesis. It needs ``expecttest``.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from trustregion.linearise import linearise
from trustregion.linearise.choose import BACKENDS
from trustregion.vector import ParameterVector

SAMPLES = 5  # of each operator, spread over those of the database
ENTRIES = 600  # of the parameters, and of the outputs, of a sample
# autograd's own gradients of the mean and the scale are wrong: their values depend on which other
# gradients are requested.
ONLY = {"native_group_norm": 1}
REFUSALS = (RuntimeError, ValueError, NotImplementedError)


def plain(x: Any) -> bool:
    """Return whether something is a strided tensor of real numbers."""
    return isinstance(x, Tensor) and x.layout is torch.strided and x.is_floating_point()


def run(op: Any, sample: Any) -> tuple[list[Tensor], list[Tensor]] | None:
    """Return the outputs of an operator of twice some parameters, and these; None if not small."""
    params: list[Tensor] = []

    def twice(x: Any) -> Any:
        if not (isinstance(x, Tensor) and x.requires_grad and x.dtype is not torch.float32):
            return x
        if not plain(x):
            raise NotImplementedError
        params.append((x.detach() / 2).requires_grad_())
        return params[-1] * 2

    try:
        given, args, kwargs = tree_map(twice, (sample.input, sample.args, dict(sample.kwargs)))
    except NotImplementedError:
        return None
    if not params or sum(p.numel() for p in params) > ENTRIES:
        return None
    result = sample.output_process_fn_grad(op(given, *args, **kwargs))
    every = [y for y in tree_flatten(result)[0] if isinstance(y, Tensor) and y.requires_grad]
    every = [torch.view_as_real(y.resolve_conj()) if y.is_complex() else y for y in every]
    outputs = [y for y in every if plain(y) and y.numel()][: ONLY.get(op.name)]
    if any(y.isnan().any() for y in outputs):
        return None
    fits = outputs and sum(y.numel() for y in outputs) <= ENTRIES
    return (outputs, params) if fits else None


def jacobian(outputs: list[Tensor], params: list[Tensor]) -> Tensor:
    """Return the dense Jacobian by one backward pass for each row."""
    rows = []
    for y in outputs:
        for entry in y.reshape(-1):
            grads = torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True)
            pairs = zip(grads, params, strict=True)
            parts = [torch.zeros_like(p) if g is None else g.to_dense() for g, p in pairs]
            rows.append(torch.cat([g.reshape(-1).double() for g in parts]))
    return torch.stack(rows)


def verdict(outputs: list[Tensor], params: list[Tensor], reference: Tensor, backend: str) -> str:
    """Return the backend whose products were right, or how it refused or was wrong."""
    generator = torch.Generator().manual_seed(1)
    vector = ParameterVector(params)
    v = torch.randn(vector.numel, generator=generator, dtype=torch.float64)
    u = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in outputs]
    try:
        J = linearise(outputs, vector, backend)
        along = torch.cat([t.reshape(-1).double() for t in J.jvp(v.to(vector.dtype))])
        back = J.vjp([x.to(y.dtype) for x, y in zip(u, outputs, strict=True)]).double()
    except REFUSALS as error:
        return f"refused: {type(error).__name__}: {str(error)[:300]}"
    eps = max(J.eps, torch.finfo(torch.float64).eps)
    flat = torch.cat([x.reshape(-1) for x in u])
    for made, right in ((along, reference @ v), (back, reference.T @ flat)):
        error = (made - right).norm()
        if not error <= eps**0.5 * right.norm() + 1e-12:  # some derivatives are zero, and rounded
            return f"wrong: off by {error:.1e} on the {J.backend}"
    return J.backend


def samples(op: Any) -> Iterator[tuple[list[Tensor], list[Tensor], Tensor]]:
    """Yield the outputs, the parameters and the Jacobian of some samples of an operator."""
    every = list(op.sample_inputs("cpu", torch.float64, requires_grad=True))
    for sample in every[:: max(1, len(every) // SAMPLES)]:
        made = run(op, sample)
        if made is None:
            continue
        outputs, params = made
        reference = jacobian(outputs, params)
        if reference.isfinite().all():
            yield outputs, params, reference


def main(names: list[str]) -> None:
    """Print the outcomes of the samples of each operator for each backend."""
    database = importlib.import_module("torch.testing._internal.common_methods_invocations")
    found: dict[str, Any] = {}
    for op in database.op_db:
        name = op.name + (f".{op.variant_test_name}" if op.variant_test_name else "")
        if (names and name not in names) or not op.supports_autograd:
            continue
        if torch.float64 not in op.supported_backward_dtypes("cpu"):
            continue
        torch.manual_seed(0)
        seen: dict[str, list[str]] = {backend: [] for backend in BACKENDS}
        try:
            for sample in samples(op):
                for backend in BACKENDS:
                    seen[backend].append(verdict(*sample, backend))
        except Exception as error:  # of the database or of torch, before anything of ours
            seen["error"] = [f"{type(error).__name__}: {error}"]
        found[name] = {backend: sorted(set(each)) for backend, each in seen.items()}
    sys.stdout.write(json.dumps(found, indent=1))


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main(sys.argv[1:])
