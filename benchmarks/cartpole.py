"""Train TRPO on CartPole-v1 for many seeds and print the table of docs/cartpole.md."""

from __future__ import annotations

import argparse
import time

import torch

from rl import TRPO, evaluate


def main() -> None:
    """Print one row a seed: steps, returns, KL and seconds of training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=10, help="how many seeds from there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| seed | steps | evaluation, mean of 20 episodes | lowest | largest KL | seconds |")
    print("|---|---|---|---|---|---|")
    for seed in range(args.first, args.first + args.seeds):
        kls: list[float] = []
        started = time.perf_counter()
        agent = TRPO("CartPole-v1", seed=seed)
        agent.learn(
            27_000,
            progress=False,
            callback=lambda _, log, kls=kls: kls.append(log["train/kl_divergence_loss"]),
        )
        seconds = time.perf_counter() - started
        result = evaluate(agent, "CartPole-v1", 20)
        print(
            f"| {seed} | {agent.num_timesteps:,} | {result.mean:.1f} | {min(result.returns):.0f}"
            f" | {max(kls):.5f} | {seconds:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
