"""Use NaturalTrustRegion in a loop of Hugging Face's accelerate.

``Accelerator.prepare`` wraps the optimizer, and ``step(closure)`` passes the closure on unchanged.
The loop has no ``backward()``. Mixed precision ``"bf16"`` works too. ``"fp16"`` is refused with an
error that explains it, because it scales the loss.

Run ``python docs/examples/accelerate_loop.py``; it takes a few seconds and needs ``accelerate``.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.utils.data import DataLoader, TensorDataset

from trustregion import NaturalTrustRegion


def curve(n: int) -> TensorDataset:
    """Return noisy points of a sine curve."""
    x = 6 * torch.rand(n, 1) - 3
    return TensorDataset(x, x.sin() + 0.1 * torch.randn(n, 1))


def main(*, epochs: int = 10, precision: str = "no") -> list[tuple[float, float]]:
    """Train, print the losses; return (loss before the step, KL after it) for each step."""
    try:
        from accelerate import Accelerator  # imported late: ``--help`` does not need it
    except ModuleNotFoundError as error:
        raise SystemExit("This example needs accelerate: pip install accelerate") from error
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = NaturalTrustRegion(model.parameters(), delta=0.1)
    loader = DataLoader(curve(512), batch_size=256, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    rows: list[tuple[float, float]] = []
    for _ in range(epochs):
        for x, y in loader:

            def closure(x: Tensor = x, y: Tensor = y) -> tuple[Tensor, Normal]:
                prediction = Normal(model(x), 0.1)
                return -prediction.log_prob(y).mean(), prediction

            optimizer.step(closure)
            info = optimizer.optimizer.info  # The wrapper's step returns nothing and hides info.
            rows.append((info.loss, info.kl))
    accelerator.print(f"{len(rows)} steps, loss {rows[0][0]:.3f} -> {rows[-1][0]:.3f}")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=10, help="passes over the data")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no", help="mixed precision")
    main(**vars(parser.parse_args()))
