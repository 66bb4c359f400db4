"""Measure the memory of a curvature product, each way in a process of its own; print a table.

After the model is made and one small product of the same way has loaded the code, the resident
memory of the process is read, the kernel's high-water mark set back, and a set-up and one product
done: forward pass, operator, product. *Peak* is how far the mark rose; *kept* is what is still
resident at the end, with freed memory given back. JAX has compiled before. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from functools import partial
from statistics import median

import torch
from torch import Tensor

from benchmarks.curvature_models import MODELS, Model, make, policy
from benchmarks.curvature_peers import MAKERS
from benchmarks.jax_peer import PYTHON, ROOT, JaxPeer
from benchmarks.report import row
from benchmarks.resident import growth

SIZES = {
    "policy 256-256, 10,000 states": partial(policy, 10_000, 256),
    **{name: MODELS[name] for name in ("classifier, batch 512", "transformer, batch 32")},
}
SMALL = partial(policy, 64, 64)
JAX = "JAX, jitted product"
MEBI = 2**20


def measure(name: str, who: str) -> dict[str, int]:
    """Return the bytes kept and the peak, in this process."""
    model = make(SIZES[name])
    if who == JAX:
        peer = JaxPeer(model, threads=1)
        answer = peer.ask(do="memory")
        peer.close()
        return answer

    def run(model: Model, v: Tensor) -> object:
        product = MAKERS[who](model)
        return product, product.run(product.domain(model, v))

    small = make(SMALL)
    run(small, small.vector())
    v = model.vector()
    kept, peak = growth(lambda: run(model, v))
    return {"kept": kept, "peak": peak}


def in_a_child(name: str, who: str) -> dict[str, int]:
    """Return what a new process measures."""
    command = [sys.executable, "-m", "benchmarks.curvature_memory", "--child", name, who]
    child = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(child.stdout)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Memory of curvature products, in Markdown.")
    parser.add_argument("--repeats", type=int, default=3, help="processes, of which the median")
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "WHO"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(1)
    if args.child:
        print(json.dumps(measure(*args.child)))
        return
    print(f"torch {torch.__version__}; MiB, median of {args.repeats} processes\n")
    print(row("who", *(f"{name}: {what}" for name in SIZES for what in ("kept", "peak"))))
    print(row("---", *["---:"] * (2 * len(SIZES))))
    for who in [*MAKERS, *([JAX] if PYTHON.exists() else [])]:
        numbers = []
        for name in SIZES:
            found = [in_a_child(name, who) for _ in range(args.repeats)]
            numbers += [median(f[what] for f in found) / MEBI for what in ("kept", "peak")]
        print(row(who, *(f"{number:.0f}" for number in numbers)), flush=True)


if __name__ == "__main__":
    main()
