"""What the trust-region optimizers share: the contract of ``torch.optim``."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..operators.base import OperatorLike
from ..preconditioners import KFAC, Gated, Preconditioner
from ..vector import ParameterVector
from .info import StepInfo
from .options import SharedOptions, option_names, shared_options
from .replicas import ProcessGroup, Replicas

# As torch's own optimizers have it: a compiled loop calls the step as it is. The public
# torch.compiler.disable does the same and costs a second of importing.
uncompiled = torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage] # see above


class TrustRegionOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose groups share one trust region."""

    info: StepInfo | None  # set in __init__: wrappers that subclass would find a class attribute
    """The account of the last step; None before the first."""

    options_class: ClassVar[type[SharedOptions]]
    _step_supports_amp_scaling = True  # so that a GradScaler shows itself, and can be refused

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        preconditioner: Preconditioner | Gated | OperatorLike | None,
        process_group: ProcessGroup | bool | None,
    ) -> None:
        self.info = None
        self.preconditioner, self.process_group = preconditioner, process_group
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options must agree with the others', ``lr`` excepted.

        Those that it does not give are the others' once a step has been taken, which may have moved
        them.
        """
        if self.state:
            shared = self.param_groups[0]
            names = option_names(self.options_class)
            param_group = {**{name: shared[name] for name in names}, **param_group}
        super().add_param_group(param_group)
        try:
            shared_options(self.param_groups, self.options_class)
            for p in self.param_groups[-1]["params"]:
                _require_whole(p)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def __repr__(self) -> str:
        """Return the options, how many numbers are optimised, and how the last step went."""
        size = sum(p.numel() for group in self.param_groups for p in group["params"])
        last = "no step yet" if self.info is None else str(self.info)
        return f"{super().__repr__()}\n{size:,} parameters; last step: {last}"

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch's optimizers do, and that of the preconditioner with it."""
        state, gate = super().state_dict(), self._gated()
        return {**state, "preconditioner": gate.state_dict()} if isinstance(gate, Gated) else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; without a state for it, the preconditioner starts anew."""
        super().load_state_dict(state_dict)
        gate = self._gated()
        if not isinstance(gate, Gated):
            return
        if "preconditioner" in state_dict:
            gate.load_state_dict(copy.deepcopy(state_dict["preconditioner"]))
        else:
            gate.preconditioner.load_state_dict({})
            self.preconditioner = Gated(gate.preconditioner, retest=gate.retest)

    def _gated(self) -> Gated | OperatorLike | None:
        """Return the preconditioner, on trial if it is built anew for each step."""
        if isinstance(self.preconditioner, Preconditioner):
            self.preconditioner = Gated(self.preconditioner)
        return self.preconditioner

    def _vector(self) -> ParameterVector:
        """Return the trainable parameters of all groups, with their names if they have any."""
        params: list[Tensor] = []
        names: list[str] = []
        for i, group in enumerate(self.param_groups):
            default = [f"{i}.{j}" for j in range(len(group["params"]))]
            for name, p in zip(group.get("param_names", default), group["params"], strict=True):
                if p.requires_grad:
                    params.append(p)
                    names.append(name)
        if not params:
            raise ValueError("no parameter requires a gradient: all of them are frozen")
        return ParameterVector(params, names)

    def _replicas(self) -> Replicas:
        replicas, rule = Replicas.of(self.process_group), self.preconditioner
        rule = rule.preconditioner if isinstance(rule, Gated) else rule
        if replicas.size > 1 and isinstance(rule, KFAC):
            raise TypeError(
                "KFAC reads the graph of one process, and the matrix of this step is the mean over"
                " several: use Jacobi(), Nystrom(rank) or Recycled(), which need its products only"
            )
        return replicas

    def _agreed(self, options: SharedOptions) -> str:
        """Return what all processes must agree on beside the parameters."""
        return f"{options}, lr {[float(group['lr']) for group in self.param_groups]}"

    def _rates(self, vector: ParameterVector) -> tuple[float, Tensor | None]:
        """Return the largest learning rate and, where the groups differ, the ratios to it."""
        trainable = [
            (float(group["lr"]), p)
            for group in self.param_groups
            for p in group["params"]
            if p.requires_grad
        ]
        lrs = [lr for lr, _ in trainable]  # a frozen group has no say
        largest = max(lrs)
        if min(lrs) == largest:
            return largest, None
        return largest, vector.ravel([torch.full_like(p, lr / largest) for lr, p in trainable])

    def _require_closure(self, returns: str) -> None:
        """Raise unless there is nothing to do, as where checkpointing calls ``step()``."""
        grads = (p.grad for group in self.param_groups for p in group["params"])
        if any(grad is not None and bool(grad.any()) for grad in grads):
            raise RuntimeError(
                f"{type(self).__name__}.step() needs a closure that returns {returns}: the"
                " gradients in .grad do not define a trust region"
            )

    def _refuse_scaler(self) -> None:
        if "grad_scale" not in self.__dict__:
            return
        del self.__dict__["grad_scale"]  # it would stay after the error
        self.__dict__.pop("found_inf", None)
        raise RuntimeError(
            f"{type(self).__name__} does not work with a GradScaler, which would scale the gradient"
            " and not the curvature. Call optimizer.step(closure) directly, with bfloat16 autocast"
            " in the closure, which needs no scaling"
        )

    def _count_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = state.get("step", torch.zeros(())) + 1
                if group.get("warm_start"):
                    state.setdefault("direction", torch.zeros_like(p, requires_grad=False))

    def _last_direction(self, vector: ParameterVector) -> Tensor:
        """Return the solution of the last step's system, zero where there is none."""
        return vector.ravel([self.state.get(p, {}).get("direction") for p in vector.params])

    def _keep_direction(self, vector: ParameterVector, x: Tensor) -> None:
        for p, part in zip(vector.params, vector.unravel(x), strict=True):
            self.state[p]["direction"] = part.clone()

    def _write(self, option: str, value: float) -> None:
        """Write an option that follows the steps to all groups, as a scheduler would."""
        for group in self.param_groups:
            group[option] = value

    def __getstate__(self) -> dict[str, Any]:
        """Return what deepcopy and pickle keep: the base class's, and the attributes here.

        A process group is none of it: torch cannot copy one, and a copy takes the default.
        """
        group = self.process_group if isinstance(self.process_group, bool) else None
        kept = {"info": self.info, "preconditioner": self.preconditioner, "process_group": group}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore; options that an older state does not know take their defaults."""
        super().__setstate__(state)
        for group in self.param_groups:
            for key in ("lr", *option_names(self.options_class)):
                group.setdefault(key, self.defaults[key])


def _require_whole(p: Tensor) -> None:
    """Refuse parameters of which this process has a part only, and complex ones."""
    if type(p).__name__ == "DTensor" or hasattr(p, "_fsdp_flattened"):
        raise TypeError(
            f"the parameter of shape {tuple(p.shape)} is sharded between processes (FSDP or"
            " tensor parallelism), and curvature needs whole ones: replicate the model and pass"
            " process_group= for data parallelism"
        )
    if p.is_complex():
        raise TypeError(
            f"the parameter of shape {tuple(p.shape)} is complex: keep it as a real parameter and"
            " use torch.view_as_complex in the model"
        )
