"""Steps from one known start, and everything that an interrupted one may leave changed."""

from __future__ import annotations

import copy
import signal
from typing import Any

import torch
from torch import nn
from torch.distributions import Distribution

from contract.problem import equal
from optimizers import natural, newton
from problems import closure_of, network
from trustregion import Jacobi


def process_settings() -> tuple[object, ...]:
    """What belongs to the process and is changed during a step."""
    cuda = torch.backends.cuda
    return (
        Distribution._validate_args,
        torch.backends.mha.get_fastpath_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        str(torch._dynamo.eval_frame._stance),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        len(nn.modules.module._global_forward_pre_hooks),
        signal.getsignal(signal.SIGINT),
    )


KINDS = {
    "natural": lambda params: natural(
        params, cg_max_iter=3, warm_start=0.5, max_delta=0.1, preconditioner=Jacobi()
    ),
    "newton": lambda params: newton(params, max_iter=3),
}


class Training:
    """A model with Dropout and batch normalization, and an optimizer that has taken two steps."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        self.model = network(3, 4, 3, nn.BatchNorm1d(4), nn.Dropout(0.2))
        draw = torch.randn(12, 3), torch.randint(3, (12,))
        self.closure = closure_of(self.model, *draw)
        self.optimizer: Any = KINDS[kind](self.model.parameters())
        for _ in range(2):
            self.optimizer.step(self.closure)
        self._model = copy.deepcopy(self.model.state_dict())
        self._state = copy.deepcopy(self.optimizer.state_dict())
        self._info, self._generator = self.optimizer.info, torch.get_rng_state()
        self.before = self.left()
        self.optimizer.step(self.closure)
        assert self.optimizer.info.accepted
        self.after = self.left()
        self.begin_again()

    def begin_again(self) -> None:
        """Go back to the start."""
        self.model.load_state_dict(self._model)
        self.optimizer.load_state_dict(copy.deepcopy(self._state))
        self.optimizer.info = self._info
        torch.set_rng_state(self._generator)
        self._settings = process_settings()

    def left(self) -> dict[str, Any]:
        """A copy of all that a step may change."""
        parts = {
            "parameters": [p.detach() for p in self.model.parameters()],
            "buffers": list(self.model.buffers()),
            "state": self.optimizer.state_dict(),
            "info": self.optimizer.info,
            "generator": torch.get_rng_state(),
        }
        return copy.deepcopy(parts)

    def harm(self) -> str:
        """Say what is neither as before the step nor as after it; empty if all of it is either."""
        now, found = self.left(), list[str]()
        if not (equal(now, self.before) or equal(now, self.after)):
            found += [name for name in now if not equal(now[name], self.before[name])]
        if process_settings() != self._settings:
            found.append("settings of the process")
        return ", ".join(found)
