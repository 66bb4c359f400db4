"""Take natural-gradient steps in several processes, each with its own samples.

Run ``torchrun --nproc-per-node 2 docs/examples/data_parallel.py``. Without ``torchrun`` one process
takes the steps on all samples, with the same losses.
"""

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.distributions import Categorical

from trustregion import NaturalTrustRegion


def main(steps: int) -> None:
    """Fit a classifier to random points; the first process prints the losses."""
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    several = dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    torch.manual_seed(0)  # the same first weights, and here the same data, in every process
    model = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 4))
    x = torch.randn(2000, 10)
    y = (x @ torch.randn(10, 4)).argmax(1)
    x, y = x[rank::size], y[rank::size]  # the samples of this process

    def closure() -> tuple[torch.Tensor, Categorical]:
        prediction = Categorical(logits=model(x))
        return -prediction.log_prob(y).mean(), prediction

    optimizer = NaturalTrustRegion(model.parameters(), delta=0.1)  # It finds the default group.
    for i in range(steps):
        optimizer.step(closure)
        if rank == 0:
            print(f"step {i + 1}: {optimizer.info}")  # It is the same in every process.
    if several:
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10, help="number of steps")
    main(**vars(parser.parse_args()))
