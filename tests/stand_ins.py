"""Stand-ins for trainers that are not installed: what they do to an optimizer and its closure.

They follow lightning 2.6 (``LightningOptimizer``, ``Precision.optimizer_step``, the manual
optimisation loop) and accelerate 1.15 (``AcceleratedOptimizer``); the tests that run on them run on
the real packages too where these are installed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


def lightning() -> ModuleType:
    """Return a module ``lightning`` with a trainer for manual optimisation."""
    module: Any = ModuleType("lightning")
    module.LightningModule, module.Trainer = LightningModule, Trainer
    return module


def accelerate() -> ModuleType:
    """Return a module ``accelerate`` with its accelerator and its optimizer."""
    module: Any = ModuleType("accelerate")
    module.Accelerator = Accelerator
    module.optimizer = SimpleNamespace(AcceleratedOptimizer=AcceleratedOptimizer)
    return module


# -- lightning


class LightningModule(nn.Module):
    automatic_optimization = True
    trainer: Trainer

    def optimizers(self) -> LightningOptimizer:
        return self.trainer.optimizer

    def log_dict(self, values: dict[str, Any]) -> None:
        self.trainer.logged = {name: float(value) for name, value in values.items()}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None: ...

    def training_step(self, batch: Any, index: int) -> None:
        raise NotImplementedError

    def configure_optimizers(self) -> torch.optim.Optimizer:
        raise NotImplementedError


class LightningOptimizer:
    """Takes on the class of what it wraps, and hands attributes through."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: LightningModule) -> None:
        self._optimizer, self._model = optimizer, model
        bases: Any = (type(self), type(optimizer))
        self.__class__: Any = type("Lightning" + type(optimizer).__name__, bases, {})

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        closure = functools.partial(self._wrap_closure, closure or (lambda: None))
        return self._optimizer.step(closure=closure, **kwargs)

    def _wrap_closure(self, closure: Callable[[], Any]) -> Any:
        result = closure()
        self._model.on_before_optimizer_step(self._optimizer)  # after every call of it
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


class Trainer:
    logged: dict[str, float]

    def __init__(self, *, max_epochs: int, precision: str, **_: Any) -> None:
        self.max_epochs, self.precision = max_epochs, precision

    def fit(self, model: LightningModule, loader: Iterable[Any]) -> None:
        assert not model.automatic_optimization
        model.trainer = self
        self.optimizer = LightningOptimizer(model.configure_optimizers(), model)
        model.train()
        for _ in range(self.max_epochs):
            for index, batch in enumerate(loader):
                with autocast(self.precision.startswith("bf16")):  # around the whole step
                    model.training_step(batch, index)


# -- accelerate


class AcceleratedOptimizer(torch.optim.Optimizer):
    """Does not call the base class's ``__init__``, and returns nothing from a step."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        device_placement: bool = True,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.optimizer, self.scaler = optimizer, scaler
        if device_placement:
            self.optimizer.load_state_dict(self.optimizer.state_dict())

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore # as accelerate has it
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> None:  # pyright: ignore # as accelerate has it
        if self.scaler is None:
            self.optimizer.step(closure)
        else:
            self.scaler.step(self.optimizer, closure)
            self.scaler.update()


class Accelerator:
    print = staticmethod(print)

    def __init__(self, *, cpu: bool = False, mixed_precision: str = "no") -> None:
        self.mixed_precision = mixed_precision

    def prepare(self, *objects: Any) -> tuple[Any, ...]:
        return tuple(map(self._prepared, objects))

    def _prepared(self, thing: Any) -> Any:
        if isinstance(thing, torch.optim.Optimizer):
            return AcceleratedOptimizer(thing)
        if isinstance(thing, nn.Module):
            forward, bf16 = thing.forward, self.mixed_precision == "bf16"

            def cast(*args: Any) -> Tensor:
                with autocast(bf16):  # in the closure, and its outputs are float32 again
                    return forward(*args)

            thing.forward = lambda *args: cast(*args).float()
        return thing


def autocast(bf16: bool) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
