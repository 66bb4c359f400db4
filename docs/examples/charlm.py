"""Fine-tune a small language model by policy gradient, within a KL budget or with a KL penalty.

A transformer of 20 thousand parameters learns to continue the Python language reference, letter by
letter (the text is ``pydoc_data.topics``, which comes with every CPython under the PSF license).
It is then rewarded for the vowels that it writes, as a language model is tuned to a reward learned
from people (Ziegler et al., Fine-Tuning Language Models from Human Preferences, 2019). Its distance
from the pre-trained model is KL(current || pre-trained) per letter, in nats, over what the current
model writes.

- NaturalTrustRegion has that KL as a constraint: the closure returns KL - budget, which must not be
  positive, and ``delta`` bounds each step.
- Adam has coefficient * KL in its loss. It runs with each coefficient of ``--coefficients`` and
  each learning rate of ``ADAM_LRS``, for as many seconds as NaturalTrustRegion took. For each
  coefficient the rate that is best for reward - coefficient * KL is shown.

Both use the same loss, the same number of sequences per step and the same pre-trained weights.
Writing the sequences is timed too. At the end of each run the reward and the KL are measured on 512
new sequences.

Run ``python docs/examples/charlm.py``; it takes about five minutes. ``--help`` shows the options.
Seconds are processor seconds of one thread.
"""

import argparse
import copy
import re
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean
from typing import NamedTuple

import torch
from race import Help, Updates, save
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from tqdm import tqdm

from trustregion import NaturalTrustRegion, StepInfo, Weighted

ALPHABET = " .,abcdefghijklmnopqrstuvwxyz"
PROMPT, LENGTH = 12, 40  # A sequence is a prompt from the text and its continuation.
REWARDED = torch.tensor([float(letter in "aeiou") for letter in ALPHABET])
DELTA = 0.03
BUDGETS, COEFFICIENTS = (0.03, 0.1, 0.3), (1.0, 0.5, 0.25)
ADAM_LRS = (0.0003, 0.001, 0.003)
NEW = 512  # sequences to measure a run with
WORDS = {"NaturalTrustRegion": "budget", "Adam": "coefficient"}  # names of the setting
COLOURS = {"NaturalTrustRegion": "#0072B2", "Adam": "#D55E00"}  # fit for color-blind readers
MARKERS = {"NaturalTrustRegion": "o", "Adam": "s"}
OFFSETS = {"NaturalTrustRegion": (-18, 6), "Adam": (18, -12)}  # where the plot shows a setting
PLOT = Path(__file__).with_suffix(".png")


class Run(NamedTuple):
    """A run of fine-tuning."""

    setting: float  # the budget, or the coefficient
    lr: float | None
    rows: list[tuple[float, ...]]  # (step, seconds, reward, KL) before a step, and at the end
    infos: list[StepInfo]  # the reports of NaturalTrustRegion on its steps
    sample: str


Runs = dict[str, list[list[Run]]]  # for each method and setting, one run per seed


class Block(nn.Module):
    """Causal attention and a two-layer perceptron, each with normalized input and a skip."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, time, width)`` to the same shape."""
        qkv = self.qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1))
        attended = scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x))


class Transformer(nn.Module):
    """A language model over letters."""

    def __init__(self, width: int = 32, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.letter = nn.Embedding(len(ALPHABET), width)
        self.position = nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(ALPHABET)))

    def forward(self, letters: Tensor) -> Tensor:
        """Return the logits of the next letter at each position, ``(batch, time, alphabet)``."""
        x = self.letter(letters) + self.position.weight[: letters.shape[1]]
        return self.head(self.blocks(x))


def read_text() -> Tensor:
    """Return the language reference as indices into the alphabet: 386,000 in Python 3.11."""
    text = " ".join(topics[name] for name in sorted(topics)).lower()
    words = re.sub(r"[^a-z.,]+", " ", text)
    return torch.tensor([ALPHABET.index(letter) for letter in words])


def excerpts(text: Tensor, count: int, length: int) -> Tensor:
    """Draw random pieces of the text."""
    return text.unfold(0, length, 1)[torch.randint(len(text) - length + 1, (count,))]


def pretrain(model: Transformer, text: Tensor, steps: int, quiet: bool) -> float:
    """Train with Adam on the text; return the mean loss in the last tenth, in nats per letter."""
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    losses = []
    for _ in tqdm(range(steps), "pre-training", disable=quiet):
        letters = excerpts(text, 32, LENGTH + 1)
        loss = cross_entropy(model(letters[:, :-1]).flatten(0, 1), letters[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return fmean(losses[-max(1, steps // 10) :])


@torch.no_grad()
def write(model: Transformer, text: Tensor, count: int) -> Tensor:
    """Continue prompts from the text until they have ``LENGTH`` letters."""
    letters = excerpts(text, count, PROMPT)
    while letters.shape[1] < LENGTH:
        chosen = Categorical(logits=model(letters)[:, -1]).sample()
        letters = torch.cat([letters, chosen[:, None]], 1)
    return letters


class Batch:
    """Sequences that the current model wrote, and the loss on them."""

    def __init__(self, model: Transformer, reference: Transformer, text: Tensor, size: int) -> None:
        self.model, self.letters = model, write(model, text, size)
        self.inputs, self.targets = self.letters[:, :-1], self.letters[:, 1:]
        self.written = torch.zeros(self.targets.shape)  # weights, 0 in the prompt and 1 after it
        self.written[:, PROMPT - 1 :] = 1.0
        rewards = REWARDED[self.targets] * self.written
        to_go = rewards.flip(1).cumsum(1).flip(1)  # the rewards that a letter can still change
        self.advantages = (to_go - to_go.mean(0)) * self.written
        with torch.no_grad():
            self.reference = Categorical(logits=reference(self.inputs))
            now = Categorical(logits=model(self.inputs))
            self.log_prob = now.log_prob(self.targets)
            self.kl = self.mean(kl_divergence(now, self.reference)).item()
        self.reward = self.mean(rewards).item()

    def mean(self, values: Tensor) -> Tensor:
        """Average over the letters that the model wrote."""
        return (values * self.written).sum() / self.written.sum()

    def evaluate(self) -> tuple[Tensor, Categorical, Tensor]:
        """Return the importance-weighted loss, the prediction, and KL(current || pre-trained)."""
        prediction = Categorical(logits=self.model(self.inputs))
        ratio = (prediction.log_prob(self.targets) - self.log_prob).exp()
        kl = self.mean(kl_divergence(prediction, self.reference))
        return -self.mean(ratio * self.advantages), prediction, kl


def natural(model: Transformer, batches: Callable[[], Batch], budget: float) -> Updates:
    """Take steps that keep KL(current || pre-trained) within the budget."""
    # The advantages of one batch are mostly noise. A large damping keeps the noise out of the
    # directions in which the predictions hardly move.
    optimizer = NaturalTrustRegion(model.parameters(), DELTA, damping=1.0)
    while True:
        batch = batches()

        def closure(batch: Batch = batch) -> tuple[Tensor, Weighted, Tensor]:
            loss, prediction, kl = batch.evaluate()
            return loss, Weighted(prediction, batch.written), (kl - budget)[None]

        optimizer.step(closure)
        yield optimizer.info


def adam(
    model: Transformer, batches: Callable[[], Batch], coefficient: float, lr: float
) -> Updates:
    """Take steps of Adam on the loss + coefficient * KL, one per batch."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    while True:
        loss, _, kl = batches().evaluate()
        optimizer.zero_grad()
        (loss + coefficient * kl).backward()
        optimizer.step()
        yield None


def tune(
    reference: Transformer,
    text: Tensor,
    size: int,
    setting: float,
    lr: float | None,
    seed: int,
    steps: int,
    seconds: float,
) -> Run:
    """Fine-tune until the steps and the seconds are both used up."""
    torch.manual_seed(seed)
    model = copy.deepcopy(reference)
    rows: list[tuple[float, ...]] = []
    infos: list[StepInfo] = []
    clock, start = 0.0, time.process_time()

    def batches() -> Batch:
        batch = Batch(model, reference, text, size)
        rows.append((len(rows), clock, batch.reward, batch.kl))
        return batch

    updates = adam(model, batches, setting, lr) if lr else natural(model, batches, setting)
    while len(rows) < steps or clock < seconds:
        info = next(updates)
        infos.extend([info] if info else [])
        clock = time.process_time() - start
    last = Batch(model, reference, text, NEW)
    rows.append((len(rows), clock, last.reward, last.kl))
    return Run(setting, lr, rows, infos, "".join(ALPHABET[i] for i in last.letters[0]))


def table(runs: Runs, start: Batch) -> str:
    """Compare the methods in means over seeds, and show a sample of our first seed."""
    lines = [f"{'lr':>38}  steps  seconds  vowels     KL  largest KL"]
    lines.append(f"{'pre-trained':<55}{start.reward:8.1%}{0:7.3f}")
    for name, groups in runs.items():
        for group in groups:
            title = f"{name}, {WORDS[name]} {group[0].setting}"
            step, seconds, reward, kl = map(
                fmean, zip(*(run.rows[-1] for run in group), strict=True)
            )
            largest = fmean(max(row[3] for row in run.rows) for run in group)
            lines.append(
                f"{title:<32}{group[0].lr or '-':>6}{step:7.0f}{seconds:9.1f}"
                f"{reward:9.1%}{kl:7.3f}{largest:12.3f}"
            )
    for run, *_ in runs["NaturalTrustRegion"]:
        lines.append(f"{run.setting:<5} {run.sample[:PROMPT]}|{run.sample[PROMPT:]}")
    return "\n".join(lines)


def draw(runs: Runs, start: Batch, path: Path) -> None:
    """Draw the final reward against KL, and the KL in training; one mark or line per seed."""
    from matplotlib.figure import Figure  # imported late: training does not need it

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    ends, ways = figure.subplots(1, 2)
    ends.plot(0, start.reward, "k*", label="pre-trained")
    for name, groups in runs.items():
        style = {"color": COLOURS[name], "alpha": 0.8}
        for group in groups:
            for run in group:
                _, seconds, rewards, kls = zip(*run.rows, strict=True)
                first = run is groups[0][0]
                label = f"{name}, {WORDS[name]}" if first else None
                ends.plot(kls[-1], rewards[-1], MARKERS[name], **style, label=label)
                ways.plot(seconds, kls, **style, linewidth=1, label=name if first else None)
            kl, reward = (fmean(run.rows[-1][i] for run in group) for i in (3, 2))
            ends.annotate(
                f"{group[0].setting}", (kl, reward), OFFSETS[name], textcoords="offset points",
                color=COLOURS[name], ha="center",
            )  # fmt: skip
    for run, *_ in runs["NaturalTrustRegion"]:
        ways.axhline(run.setting, color="black", linewidth=0.8, linestyle=":")
    ways.plot([], [], "k:", label="budgets")
    ends.set(xlabel="KL(current || pre-trained), nats per letter", ylabel="share of vowels")
    ways.set(xlabel="seconds", ylabel="KL(current || pre-trained), nats per letter")
    for ax in (ends, ways):
        ax.legend(frameon=False)
    save(figure, path)


def main(
    *,
    pretraining: int = 1000,
    steps: int = 16,
    sequences: int = 48,
    budgets: Sequence[float] = BUDGETS,
    coefficients: Sequence[float] = COEFFICIENTS,
    seeds: int = 3,
    plot: Path = PLOT,
    quiet: bool = False,
) -> Runs:
    """Pre-train, fine-tune, print a table, save the plot; return the runs by setting and seed."""
    torch.manual_seed(0)
    text, reference = read_text(), Transformer()
    loss = pretrain(reference, text, pretraining, quiet)
    start = Batch(reference, reference, text, NEW)
    size = sum(p.numel() for p in reference.parameters())
    print(f"{size} parameters, pre-trained to {loss:.2f} nats per letter\n")

    ours = [(budget, None) for budget in budgets]
    jobs = [*ours, *product(coefficients, ADAM_LRS)]
    runs: dict[tuple[float, float | None], list[Run]] = {job: [] for job in jobs}
    for seed, (setting, lr) in tqdm(list(product(range(seeds), jobs)), disable=quiet):
        # Adam gets as many seconds as NaturalTrustRegion took, in the mean over budgets.
        seconds = fmean(runs[job][seed].rows[-1][1] for job in ours) if lr else 0.0
        run = tune(reference, text, sequences, setting, lr, seed, 1 if lr else steps, seconds)
        runs[setting, lr].append(run)

    def objective(group: list[Run]) -> float:
        return fmean(run.rows[-1][2] - run.setting * run.rows[-1][3] for run in group)

    best = {
        "NaturalTrustRegion": [runs[job] for job in ours],
        "Adam": [max((runs[c, lr] for lr in ADAM_LRS), key=objective) for c in coefficients],
    }
    print(table(best, start))
    draw(best, start, plot)
    return best


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--pretraining", type=int, default=1000, help="steps of pre-training")
    parser.add_argument("--steps", type=int, default=16, help="steps of NaturalTrustRegion")
    parser.add_argument("--sequences", type=int, default=48, help="sequences per step")
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=BUDGETS, help="budgets in nats per letter"
    )
    parser.add_argument(
        "--coefficients", type=float, nargs="+", default=COEFFICIENTS, help="prices of a nat"
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--plot", type=Path, default=PLOT, help="where to save the plot")
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    torch.set_num_threads(1)  # Such small matrices gain nothing from more; timings vary less.
    main(**vars(parser.parse_args()))
