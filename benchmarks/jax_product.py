"""Curvature products in JAX, for the process that asks on standard input, a line of JSON each.

It runs in an environment of its own and knows torch's models from their weights, a file of arrays.
The Jacobian is linearised once, as ``jax.linearize`` does; what it keeps is an argument of the
jitted product ``v -> J'(M(Jv))``, so that the product computes nothing again.

``{"do": "load", "path": p}`` reads a model; ``{"do": "product", "path": p}`` writes the product;
``{"do": "time", "what": w, "calls": k}`` answers with the seconds of ``k`` set-ups, products, or
solves of ten iterations; ``{"do": "memory"}`` with the bytes kept and the peak of a set-up and one
product.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from benchmarks.resident import growth

Array = jax.Array
HEADS, DAMPING, ITERATIONS = 4, 0.1, 10


def dense(x: Array, p: Iterator[Array]) -> Array:
    """A layer of torch: weights of shape (outputs, inputs)."""
    weight, bias = next(p), next(p)
    return x @ weight.T + bias


def mlp(params: list[Array], x: Array, activation: Callable[[Array], Array]) -> Array:
    p = iter(params)
    for _ in range(len(params) // 2 - 1):
        x = activation(dense(x, p))
    return dense(x, p)


def conv(params: list[Array], x: Array) -> Array:
    """Channels last, the order that XLA is fast in; the weights come in torch's."""
    p = iter(params)
    for _ in range(2):
        weight, bias = next(p).transpose(2, 3, 1, 0), next(p)
        numbers = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=numbers) + bias
        x = lax.reduce_window(
            jax.nn.relu(x), -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
        )
    return dense(x.transpose(0, 3, 1, 2).reshape(len(x), -1), p)


def norm(x: Array, p: Iterator[Array]) -> Array:
    weight, bias = next(p), next(p)
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * weight + bias


def attention(x: Array, p: Iterator[Array]) -> Array:
    samples, length, width = x.shape
    q, k, v = (
        part.reshape(samples, length, HEADS, -1).transpose(0, 2, 1, 3)
        for part in jnp.split(dense(x, p), 3, axis=-1)
    )
    scores = q @ k.transpose(0, 1, 3, 2) / (width // HEADS) ** 0.5
    causal = jnp.tril(jnp.ones((length, length), bool))
    y = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf)) @ v
    return dense(y.transpose(0, 2, 1, 3).reshape(x.shape), p)


def transformer(params: list[Array], text: Array) -> Array:
    places, symbols, *rest = params  # torch lists a module's own parameters first
    p = iter(rest)
    x = symbols[text] + places
    for _ in range(len(rest) // 12):
        x = x + attention(norm(x, p), p)
        hidden = jax.nn.gelu(dense(norm(x, p), p), approximate=False)
        x = x + dense(hidden, p)
    return dense(norm(x, p), p).reshape(text.size, -1)


NETS: dict[str, Callable[[list[Array], Array], Array]] = {
    "mlp tanh": lambda params, x: mlp(params, x, jnp.tanh),
    "mlp relu": lambda params, x: mlp(params, x, jax.nn.relu),
    "conv": conv,
    "transformer": transformer,
}

Outputs = tuple[Array, Array]


def normal_metric(y: Outputs, d: Outputs) -> Outputs:
    """The Fisher matrix of independent normals, in mean and log-scale, over the batch."""
    log_std = y[1]
    return jnp.exp(-2 * log_std) * d[0] / len(d[0]), 2 * d[1]


def categorical_metric(y: Array, d: Array) -> Array:
    p = jax.nn.softmax(y)
    return p * (d - (p * d).sum(-1, keepdims=True)) / len(d)


class Problem:
    """A model with its jitted functions."""

    def __init__(self, path: str) -> None:
        with np.load(path) as arrays:
            kind, normal = str(arrays["kind"]), bool(arrays["normal"])
            count = int(arrays["count"])
            params = [jnp.asarray(arrays[f"p{i}"]) for i in range(count)]
            inputs = arrays["inputs"]
            self.v, self.g = jnp.asarray(arrays["v"]), jnp.asarray(arrays["g"])
        net = NETS[kind]
        x = jnp.asarray(inputs.transpose(0, 2, 3, 1) if kind == "conv" else inputs)
        flat, unravel = ravel_pytree(params)

        def outputs(theta: Array) -> Any:
            parts = unravel(theta)
            return (net(parts[:-1], x), parts[-1]) if normal else net(parts, x)

        metric: Callable[[Any, Any], Any] = normal_metric if normal else categorical_metric
        self.theta = flat

        def product(y: Any, jvp: Callable[[Array], Any], v: Array) -> Array:
            transposed = jax.linear_transpose(jvp, v)
            return transposed(metric(y, jvp(v)))[0]

        def solve(y: Any, jvp: Callable[[Array], Any], g: Array) -> Array:
            return cg(lambda v: product(y, jvp, v) + DAMPING * v, g)

        self.linearise = jax.jit(lambda theta: jax.linearize(outputs, theta))
        self.product, self.solve = jax.jit(product), jax.jit(solve)
        self.kept = self.linearise(self.theta)

    def run(self, what: str) -> Any:
        if what == "setup":
            return self.linearise(self.theta)
        return (
            self.product(*self.kept, self.v)
            if what == "product"
            else self.solve(*self.kept, self.g)
        )


def cg(A: Callable[[Array], Array], b: Array) -> Array:
    """Conjugate gradients, ten iterations."""

    def iteration(_: int, state: tuple[Array, Array, Array, Array]) -> tuple[Array, ...]:
        x, r, p, rr = state
        Ap = A(p)
        step = rr / (p @ Ap)
        r = r - step * Ap
        new = r @ r
        return x + step * p, r, r + new / rr * p, new

    return lax.fori_loop(0, ITERATIONS, iteration, (jnp.zeros_like(b), b, b, b @ b))[0]


def timed(problem: Problem, what: str, calls: int) -> dict[str, float]:
    """Return the seconds of the calls, after one that does not count."""
    jax.block_until_ready(problem.run(what))
    start, processor = time.perf_counter(), time.process_time()
    for _ in range(calls):
        result = problem.run(what)
    jax.block_until_ready(result)
    return {
        "passed": time.perf_counter() - start,
        "processor": time.process_time() - processor,
    }


def memory(problem: Problem) -> dict[str, int]:
    """Return the bytes that a set-up and one product keep, and their peak."""

    def run() -> Any:
        kept = problem.linearise(problem.theta)
        return kept, jax.block_until_ready(problem.product(*kept, problem.v))

    jax.block_until_ready(problem.run("product"))  # compiled now
    del problem.kept
    kept, peak = growth(run)
    return {"kept": kept, "peak": peak}


def main() -> None:
    """Answer until the input ends."""
    problem: Problem | None = None
    for line in sys.stdin:
        ask = json.loads(line)
        answer: dict[str, Any] = {}
        if ask["do"] == "load":
            problem = Problem(ask["path"])
            answer = {"jax": jax.__version__}
        assert problem is not None
        if ask["do"] == "product":
            np.save(ask["path"], np.asarray(problem.run("product")))
        elif ask["do"] == "time":
            answer = timed(problem, ask["what"], ask["calls"])
        elif ask["do"] == "memory":
            answer = memory(problem)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
