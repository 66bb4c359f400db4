"""Use NaturalTrustRegion under a Lightning trainer, by manual optimization.

Lightning's automatic optimization calls ``backward()`` in a closure of its own, which returns no
distribution. With ``automatic_optimization = False`` the closure is ours; the trainer still moves
the data, logs, saves and restores. Precision ``"bf16-mixed"`` works too. ``"16-mixed"`` does not
work, because it scales the loss.

Run ``python docs/examples/lightning_manual.py``; it takes a few seconds and needs ``lightning``.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.utils.data import DataLoader, TensorDataset

from trustregion import NaturalTrustRegion

try:
    from lightning import LightningModule, Trainer
except ModuleNotFoundError:  # ``--help`` works without it.
    LightningModule, Trainer = nn.Module, None


class Classifier(LightningModule):
    """A network that says on which of two rings a point lies."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
        self.rows: list[tuple[float, float]] = []  # (loss before the step, KL after it)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer; ``training_step`` would have to step a scheduler too."""
        return NaturalTrustRegion(self.parameters(), delta=0.1)

    def training_step(self, batch: list[Tensor], _: int) -> None:
        """Take one step on a batch, which is the same in all calls of the closure."""
        x, y = batch

        def closure() -> tuple[Tensor, Categorical]:
            prediction = Categorical(logits=self.net(x))
            return -prediction.log_prob(y).mean(), prediction

        wrapped = self.optimizers()
        loss = wrapped.step(closure)
        info = wrapped.optimizer.info  # ``wrapped`` is Lightning's wrapper of the optimizer.
        self.log_dict({"loss": loss, "kl": info.kl})
        self.rows.append((loss.item(), info.kl))


def rings(n: int) -> TensorDataset:
    """Return noisy points on two rings around the origin, and the ring of each point."""
    y = torch.arange(n) % 2
    angle, radius = 2 * torch.pi * torch.rand(n), 1.0 + y + 0.2 * torch.randn(n)
    return TensorDataset(torch.stack([angle.cos(), angle.sin()], -1) * radius.unsqueeze(-1), y)


def main(
    *, epochs: int = 10, precision: str = "32-true", quiet: bool = False
) -> list[tuple[float, float]]:
    """Train, print the losses; return a row for each step."""
    if Trainer is None:
        raise SystemExit("This example needs lightning: pip install lightning")
    torch.manual_seed(0)
    model, loader = Classifier(), DataLoader(rings(512), batch_size=256, shuffle=True)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=not quiet,
    )
    trainer.fit(model, loader)
    print(f"{len(model.rows)} steps, loss {model.rows[0][0]:.3f} -> {model.rows[-1][0]:.3f}")
    return model.rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=10, help="passes over the data")
    parser.add_argument(
        "--precision",
        choices=["32-true", "bf16-mixed"],
        default="32-true",
        help="precision of the trainer",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    main(**vars(parser.parse_args()))
