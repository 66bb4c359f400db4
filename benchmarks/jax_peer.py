"""A process with JAX that takes its turns with the others; see ``jax_product.py``."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.curvature_models import Model

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".venv-jax" / "bin" / "python"


class JaxPeer:
    """The products of one model in JAX, with a given number of threads."""

    def __init__(self, model: Model, threads: int) -> None:
        self._folder, self._threads = tempfile.TemporaryDirectory(), threads
        # NPROC is how many threads XLA's pool has
        environment = {**os.environ, "NPROC": str(threads), "JAX_PLATFORMS": "cpu"}
        if threads == 1:
            environment["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
        self._process = subprocess.Popen(
            [PYTHON, "-m", "benchmarks.jax_product"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment,
            text=True,
        )
        path = Path(self._folder.name) / "model.npz"
        params = [p.detach().numpy() for p in model.parameters()]
        arrays = {
            "kind": np.array(model.kind),
            "normal": np.array(model.log_std is not None),
            "count": np.array(len(params)),
            "inputs": model.inputs.numpy(),
            "v": model.vector().numpy(),
            "g": model.vector(seed=3).numpy(),
        }
        arrays |= {f"p{i}": p for i, p in enumerate(params)}
        np.savez(path, allow_pickle=False, **arrays)
        self.version = self.ask(do="load", path=str(path))["jax"]

    def ask(self, **question: Any) -> dict[str, Any]:
        """Return the answer to a question."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the JAX process ended: its error is above")
        return json.loads(answer)

    def product(self) -> Tensor:
        """Return the product of the model's vector."""
        path = Path(self._folder.name) / "product.npy"
        self.ask(do="product", path=str(path))
        return torch.from_numpy(np.load(path))

    def seconds(self, what: str, calls: int) -> float:
        """Return how long the calls took, in a row; by the processor's time with one thread."""
        clock = "processor" if self._threads == 1 else "passed"
        return self.ask(do="time", what=what, calls=calls)[clock]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._folder.cleanup()
