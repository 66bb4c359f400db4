"""The contract of ``torch.optim``, which both trust-region optimizers keep."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..autodiff import out_of_memory
from ..interrupts import deferred
from ..operators.base import OperatorLike
from ..preconditioners import KFAC, Gated, Preconditioner
from ..preconditioners.gate import check_preconditioner
from ..status import Status
from ..vector import ParameterVector
from .closure import Evaluation
from .info import StepInfo
from .objective import Objective, first_sums
from .options import OptionsT, SharedOptions, option_names, shared_options
from .processes import Processes, ProcessGroup
from .units import Units

# A compiled training loop calls the step uncompiled, as it does with torch's own optimizers. The
# public torch.compiler.disable does the same, but takes a second to import.
P = ParamSpec("P")
T = TypeVar("T")
uncompiled = torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage] # see above


def atomic(step: Callable[P, T]) -> Callable[P, T]:
    """Return a method ``step`` that runs without grad, and that no signal leaves half-way."""
    return uncompiled(deferred(torch.no_grad()(step)))


DIFFERS = (
    "the closure does not repeat within a step, so the parameters were restored: {}. A step"
    " compares several calls: draw the batch before the step, outside the closure, and let no"
    " other thread draw random numbers meanwhile."
    " check_closure(closure, params) says what else differs"
)
OUT_OF_MEMORY = (
    "The memory does not suffice for this step, which has changed nothing: take it again with a"
    " smaller batch. NaturalTrustRegion.step also takes the curvature of fewer samples, as"
    " curvature=; see subsample"
)


class TrustRegionOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose groups share one trust region."""

    info: StepInfo | None  # Set in __init__, since wrappers that subclass would find a class value.
    """The report of the last step; None before the first."""

    options_class: ClassVar[type[SharedOptions]]
    _step_supports_amp_scaling = True  # A GradScaler then shows itself, and can be refused.

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        preconditioner: Preconditioner | Gated | OperatorLike | None,
        process_group: ProcessGroup | bool | None,
    ) -> None:
        self.info, self._repeats, self._modules = None, False, None
        check_preconditioner(preconditioner)
        self.preconditioner, self.process_group = preconditioner, process_group
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, whose options must agree with those of the other groups except for ``lr``.

        Once a step has been taken, which may have changed the options, the new group takes the
        present values of the options that it does not give.
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
        """Return the options, the number of parameters, and how the last step went."""
        size = sum(p.numel() for group in self.param_groups for p in group["params"])
        last = "no step yet" if self.info is None else str(self.info)
        settings = "".join(f"{name}={value!r}, " for name, value in self._settings().items())
        return f"{super().__repr__()}\n{settings}{size:,} parameters; last step: {last}"

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch's optimizers do, together with the preconditioner's."""
        state, gate = super().state_dict(), self._gated()
        return {**state, "preconditioner": gate.state_dict()} if isinstance(gate, Gated) else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state; a preconditioner without a saved state starts afresh."""
        super().load_state_dict(state_dict)
        self._repeats = self._repeats or bool(self.state)
        gate = self._gated()
        if not isinstance(gate, Gated):
            return
        if "preconditioner" in state_dict:
            gate.load_state_dict(copy.deepcopy(state_dict["preconditioner"]))
        else:
            gate.preconditioner.load_state_dict({})
            self.preconditioner = Gated(gate.preconditioner, retest=gate.retest)

    def _options(self, kind: type[OptionsT]) -> OptionsT:
        """Return the options of this step, checked."""
        self._refuse_scaler()
        return shared_options(self.param_groups, kind)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """If a step cannot begin, tell the other processes, which wait in their first reduction."""
        try:
            yield
        except Exception:
            # What is raised says more than a wrong or broken group.
            with suppress(TypeError, ValueError, RuntimeError):
                processes = Processes.of(self.process_group)
                processes.tell_of_failure(first_sums(self.param_groups[0]["params"][0]))
            raise

    @contextmanager
    def _objective(
        self,
        closure: Callable[[], object],
        read: Callable[[Any], Evaluation],
        options: SharedOptions,
    ) -> Iterator[Objective]:
        """Enter a step at the present parameters; on leaving it, keep its report and count it.

        If anything is raised until then, nothing has changed.
        """
        with self._told():
            vector, processes = self._vector(), self._processes()
            objective = Objective(
                closure,
                read,
                vector,
                processes,
                Units.of(self.param_groups, vector),
                options.sign,
                repeats=self._repeats,
                modules=self._modules,
            )
        with self._undone_on_error(), objective:
            state = self._decisive(vector, options) if processes.size > 1 else None
            objective.first(self._settled(options), state)
            yield objective
            self._commit(objective, options)
        if objective.info.status is Status.NOT_REPRODUCIBLE and not objective.repeats:
            # Torch's wrappers stand between this frame and the line of the user.
            warnings.warn(DIFFERS.format(objective.info.detail), stacklevel=9)

    @contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        """Put the preconditioner's state back if a step fails."""
        gate = self._gated()
        before = gate.state_dict() if isinstance(gate, Gated) else None
        try:
            yield
        except BaseException as error:
            if isinstance(gate, Gated) and before is not None:
                gate.load_state_dict(before)
            if out_of_memory(error):
                error.add_note(OUT_OF_MEMORY)
            raise

    def _commit(self, objective: Objective, options: SharedOptions) -> None:
        """Write what a step leaves besides the parameters; all of it is computed before."""
        info = replace(objective.info, evaluations=objective.evaluations)
        directions: dict[Tensor, Tensor] = {}
        if options.warm_start and objective.solution is not None:
            vector = objective.vector
            parts = vector.unravel(objective.solution)
            directions = {p: part.clone() for p, part in zip(vector.params, parts, strict=True)}
        self._count_step(directions)
        for group in self.param_groups:  # as a scheduler would
            group.update(objective.options)
        self._repeats, self._modules = objective.repeats, objective.modules
        self.info = info

    def _nothing_to_do(self, returns: str) -> None:
        """Count a step without a closure, as checkpointing takes it; refuse one with gradients."""
        self._options(self.options_class)
        grads = (p.grad for group in self.param_groups for p in group["params"])
        if any(grad is not None and bool(grad.any()) for grad in grads):
            raise RuntimeError(
                f"{type(self).__name__}.step() needs a closure that returns {returns}: the"
                " gradients in .grad do not define a trust region"
            )
        self._count_step()

    def _gated(self) -> Gated | OperatorLike | None:
        """Return the preconditioner, on trial if it is one that is built in each step."""
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

    def _processes(self) -> Processes:
        processes, rule = Processes.of(self.process_group), self.preconditioner
        rule = rule.preconditioner if isinstance(rule, Gated) else rule
        if processes.size > 1 and isinstance(rule, KFAC):
            raise TypeError(
                "KFAC reads the graph of one process, and the matrix of this step is the mean over"
                " several: use Jacobi(), Nystrom(rank) or Recycled(), which need its products only"
            )
        return processes

    def _settings(self) -> dict[str, str]:
        """Return the settings that are attributes and not options of the groups."""
        return {}

    def _decisive(self, vector: ParameterVector, options: SharedOptions) -> object:
        """Return what else all processes must agree on, since it decides how they solve."""
        gate = self._gated()
        kept = gate.state_dict() if isinstance(gate, Gated) else None
        return kept, self._last_solution(vector, options)

    def _settled(self, options: SharedOptions) -> str:
        """Return everything besides the parameters that all processes must agree on."""
        lrs = [float(group["lr"]) for group in self.param_groups]
        settings = "".join(f", {name}={value}" for name, value in self._settings().items())
        return f"{options}, lr {lrs}{settings}"

    def _refuse_scaler(self) -> None:
        if "grad_scale" not in self.__dict__:
            return
        del self.__dict__["grad_scale"]  # It would stay after the error.
        self.__dict__.pop("found_inf", None)
        raise RuntimeError(
            f"{type(self).__name__} does not work with a GradScaler, which would scale the gradient"
            " and not the curvature. Call optimizer.step(closure) directly, with bfloat16 autocast"
            " in the closure, which needs no scaling"
        )

    def _count_step(self, directions: Mapping[Tensor, Tensor] = MappingProxyType({})) -> None:
        """Count a step, and keep the directions of a warm start by parameter."""
        new: list[tuple[Tensor, dict[str, Tensor]]] = []
        for group in self.param_groups:
            for p in group["params"]:
                old = self.state.get(p, {})
                state = {"step": old.get("step", torch.zeros((), device="cpu")) + 1}
                if p in directions:
                    state["direction"] = directions[p]
                elif group.get("warm_start") and "direction" not in old:
                    state["direction"] = torch.zeros_like(p, requires_grad=False)
                new.append((p, state))
        for p, state in new:
            self.state[p].update(state)

    def _last_solution(self, vector: ParameterVector, options: SharedOptions) -> Tensor | None:
        """Return the last step's solution for a warm start, zero before the first."""
        if not options.warm_start:
            return None
        return vector.ravel([self.state.get(p, {}).get("direction") for p in vector.params])

    def __getstate__(self) -> dict[str, Any]:
        """Return what deepcopy and pickle keep: the base class's state and these attributes.

        Torch cannot copy a process group, so a copy takes the default one.
        """
        group = self.process_group if isinstance(self.process_group, bool) else None
        kept = {
            "info": self.info,
            "_repeats": self._repeats,
            "preconditioner": self.preconditioner,
            "process_group": group,
        }
        return {**super().__getstate__(), **kept, **self._settings()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore; options that an older state lacks take their defaults."""
        super().__setstate__({"_repeats": False, "_modules": None, **state})
        for group in self.param_groups:
            for key in ("lr", *option_names(self.options_class)):
                group.setdefault(key, self.defaults[key])


def _require_whole(p: Tensor) -> None:
    """Refuse parameters that are sharded between processes, and complex ones."""
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
