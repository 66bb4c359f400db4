"""Time and memory of one product with the curvature of a million samples, batch by batch."""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from trustregion import FisherOperator
from trustregion.operators import BatchedOperator


def peak() -> float:
    """Return the largest resident memory of the process so far, in MiB (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print the seconds of a product, and the memory of it above what it started from."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=5_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 64), nn.Tanh(), nn.Linear(64, 10))
    whole, rest = divmod(args.samples, args.batch)

    def batches() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        for size in [args.batch] * whole + [rest] * bool(rest):
            yield torch.rand(size, 784, generator=generator)

    def make(x: Tensor) -> FisherOperator:
        return FisherOperator(Categorical(logits=model(x), validate_args=False), model.parameters())

    v = torch.randn(sum(p.numel() for p in model.parameters()))
    make(next(batches())) @ v
    one = peak()
    F = BatchedOperator(make, batches)
    started = time.perf_counter()
    F @ v
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    for _ in batches():
        pass
    loading = time.perf_counter() - started
    print(f"{F.total:,.0f} samples in batches of {args.batch:,}, 784-64-10, one thread")
    print(f"one product: {seconds:.1f} s, of which {loading:.1f} s make the data")
    print(f"peak memory: {peak():.0f} MiB, after a product with one batch {one:.0f} MiB")


if __name__ == "__main__":
    main()
