"""Policies for use without this package: their weights, and programs of torch.export and ONNX."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from gymnasium import spaces
from torch import Tensor, nn

from .envs.batches import leaves
from .envs.layout import ObservationLayout
from .files import replace_file
from .json_tree import to_json
from .networks.heads import BernoulliHead, CategoricalHead, GaussianHead, MultiCategoricalHead
from .networks.policy import HeadPolicy, Policy
from .saving import describe

_METADATA = "torch-trustregion"
_HEADS = (CategoricalHead, MultiCategoricalHead, BernoulliHead, GaussianHead)


def export_weights(agent: Any, path: str | Path) -> None:
    """Write the weights of an agent's policy alone, as safetensors.

    The entry ``"torch-trustregion"`` of the file's metadata says in JSON what they are of:
    algorithm, environment id, config and spaces.

    Args:
        agent: the agent.
        path: the file, such as ``policy.safetensors``.

    """
    what, origin = describe(agent), agent.layout.origin
    what["layout"]["origin"] = None if origin is None else origin.tolist()
    metadata = {"format": "pt", _METADATA: to_json(what)[0].decode()}
    # copies share no memory with others, which safetensors refuses
    weights = {k: x.clone().contiguous() for k, x in agent.policy.state_dict().items()}
    data = safetensors.torch.save(weights, metadata)
    replace_file(Path(path), lambda file: file.write(data))


def export_policy(agent: Any, path: str | Path) -> None:
    """Write an agent's policy as a program that runs without this package.

    The program takes a batch of observations as the environment gives them, and returns the most
    likely actions as the environment takes them: normalisation, squashing and clipping are part of
    it. A Dict or Tuple of observations is a dict or tuple of tensors. Where the environment gives
    action masks in its infos, they are a second argument, int8 ``(B, n)``. A batch has any size.

    A ``.pt2`` file is run by ``torch.export.load(path).module()``, and an ``.onnx`` file by any
    runtime of ONNX; making one needs the packages ``onnx`` and ``onnxscript``.

    Args:
        agent: the agent.
        path: the file, which ends in ``.pt2`` or ``.onnx``.

    Raises:
        ValueError: another kind of file, or a policy of your own that cannot be traced or converts
            its actions in numpy.

    """
    file = Path(path)
    if file.suffix not in (".pt2", ".onnx"):
        raise ValueError(f"a policy is exported to a file .pt2 or .onnx, got {file.name}")
    if file.suffix == ".onnx" and not (find_spec("onnx") and find_spec("onnxscript")):
        raise ValueError("an .onnx file needs pip install onnx onnxscript, and a .pt2 file neither")
    program = _Program(agent.policy, agent.layout).eval().requires_grad_(False)
    batch = {0: torch.export.Dim("batch")}
    example, shapes = (_leafwise(agent.layout.space, make) for make in (_two, lambda _: batch))
    example, shapes = (example,), (shapes,)
    if (mask := agent.layout.info_mask) is not None:
        example, shapes = (*example, torch.ones(2, *mask.shape, dtype=torch.int8)), (*shapes, batch)
    try:
        exported = torch.export.export(program, example, dynamic_shapes=shapes)
    except Exception as error:  # a policy of one's own may do anything
        raise ValueError(
            f"{type(agent.policy).__name__} cannot be exported for batches of any size:"
            f" {' '.join(str(error).split())[:300]}"
        ) from error
    data = io.BytesIO()
    if file.suffix == ".pt2":
        torch.export.save(exported, data)
    else:
        made = torch.onnx.export(exported, verbose=False)
        assert made is not None
        data.write(made.model_proto.SerializeToString())
    replace_file(file, lambda out: out.write(data.getbuffer()))


def _leafwise(space: Any, make: Callable[[Any], Any]) -> Any:
    """Return dicts and tuples as the observations of a space are, of what is made of each leaf."""
    if isinstance(space, spaces.Dict):
        return {key: _leafwise(inner, make) for key, inner in space.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_leafwise(inner, make) for inner in space)
    return make(space)


def _two(space: Any) -> Tensor:
    """Return a batch of two observations; torch takes a batch of one to be always one."""
    return torch.from_numpy(np.zeros((2, *space.shape), space.dtype))


class _Program(nn.Module):
    """A policy from observations, instead of rows, to actions as the environment takes them."""

    def __init__(self, policy: Policy, layout: ObservationLayout) -> None:
        super().__init__()
        self.policy = copy.deepcopy(policy).cpu()
        self.dtype = torch.uint8 if layout.dtype == np.uint8 else torch.float32
        parts = [
            _Part(path, space, None if layout.origin is None else layout.origin[part.columns])
            for (path, space), part in zip(leaves(layout.space), layout.parts, strict=False)
        ]
        self.parts = nn.ModuleList(parts)
        self.actions = _Actions(policy)

    def forward(self, observation: Any, action_mask: Tensor | None = None) -> Tensor:
        columns = [part(observation) for part in self.parts]
        columns += [] if action_mask is None else [action_mask]
        rows = torch.cat([x.to(self.dtype) for x in columns], dim=1)
        return self.actions(self.policy.mode(rows))


class _Part(nn.Module):
    """The columns of one space within an observation: see :meth:`ObservationLayout.write`."""

    entry: Tensor
    choices: Tensor
    origin: Tensor | None

    def __init__(self, path: tuple[Any, ...], space: Any, origin: np.ndarray | None) -> None:
        super().__init__()
        self.path, self.counted = path, isinstance(space, spaces.Discrete | spaces.MultiDiscrete)
        self.size = int(np.prod(space.shape))
        if self.counted:  # one-hot: an entry is repeated for each of its choices
            counts = np.ravel(space.n if isinstance(space, spaces.Discrete) else space.nvec)
            choices = np.concatenate([np.arange(n) for n in counts])
            self.register_buffer("entry", torch.from_numpy(np.arange(len(counts)).repeat(counts)))
            choices = choices + np.ravel(space.start).repeat(counts)
            self.register_buffer("choices", torch.from_numpy(choices))
        if origin is not None and (self.counted or not origin.any()):
            origin = None
        self.register_buffer("origin", None if origin is None else torch.from_numpy(origin.copy()))

    def forward(self, observation: Any) -> Tensor:
        for key in self.path:
            observation = observation[key]
        values = observation.reshape(observation.shape[0], self.size)
        if self.counted:
            return values[:, self.entry] == self.choices
        return values if self.origin is None else values.double() - self.origin


class _Actions(nn.Module):
    """What :meth:`Policy.to_env` of our own heads does, in torch."""

    low: Tensor
    high: Tensor
    start: Tensor

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.head = policy.head if isinstance(policy, HeadPolicy) else None
        known = type(self.head) in _HEADS
        if type(policy).to_env is not (HeadPolicy if known else Policy).to_env:
            raise ValueError(
                f"{type(policy).__name__} converts actions in numpy, by its own to_env, which"
                " cannot be exported"
            )
        for name in ("low", "high", "start"):
            value = getattr(self.head, name, None)
            if isinstance(value, np.ndarray):
                self.register_buffer(name, torch.from_numpy(value.copy()))

    def forward(self, actions: Tensor) -> Tensor:
        match self.head:
            case CategoricalHead():
                return actions + self.head.start
            case MultiCategoricalHead():
                return actions.reshape(-1, *self.head.shape) + self.start
            case BernoulliHead():
                return actions.to(torch.int8).reshape(-1, *self.head.shape)
            case GaussianHead():
                shaped = actions.reshape(-1, *self.head.shape)
                if self.head.squash:
                    middle, half = (self.high + self.low) / 2, (self.high - self.low) / 2
                    shaped = middle + half * shaped.tanh()
                return shaped.maximum(self.low).minimum(self.high).to(self.low.dtype)
        return actions
