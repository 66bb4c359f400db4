"""Exported policies act as the agent does, in a process that does not have this package."""

import copy
import json
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete
from safetensors import safe_open
from torch import nn
from torch.distributions import Independent, Normal

from agents import SMALL, TwoNumbers, same
from rl import TRPO, Policy, export_policy, export_weights
from rl.saving import describe
from toys import Clock, Slide

# runs programs on observations, all saved by torch, and saves what they return
ALONE = """
import sys
for name in ("rl", "trustregion", "gymnasium"):
    sys.modules[name] = None  # importing them fails
import torch
results = []
for file, batches in torch.load(sys.argv[1]):
    program = torch.export.load(file).module()
    results.append([program(*batch) for batch in batches])
torch.save(results, sys.argv[2])
"""


def drawn(space):
    """Return an observation whose mask, if it has one, allows something."""
    observation = space.sample()
    if isinstance(space, spaces.Dict):
        observation["action_mask"] = np.array([0, 1, 1, 0, 1], np.int8)
    return observation


class Anything(Clock):
    """An environment of any spaces, whose observations are drawn."""

    def __init__(self, observations, actions, masked=False):
        super().__init__()
        self.observation_space, self.action_space, self.masked = observations, actions, masked

    def _observation(self):
        return drawn(self.observation_space)

    def _infos(self):
        return {"action_mask": np.eye(3, dtype=np.int8)[self.time % 3]} if self.masked else {}

    def reset(self, **options):
        return super().reset(**options)[0], self._infos()

    def step(self, action):
        self.time += 1
        assert self.action_space.contains(action)
        return self._observation(), 1.0, self.time == 5, False, self._infos()


STATE = Box(-5, 5, (3,), np.float32)
ANY = Box(-np.inf, np.inf, (1,), np.float32)
MIXED = spaces.Dict(
    image=Box(0, 255, (9, 8, 3), np.uint8),
    time=Box(1.7e9, 1.7e9 + 60, (2,), np.float64),
    gear=Discrete(3, start=-1),
    inner=spaces.Tuple([MultiBinary(2), MultiDiscrete([[2, 3]], start=[[5, 6]])]),
    action_mask=MultiBinary(5),
)
CASES = {
    "squashed": ((STATE, Box(np.float32([-2, 0]), np.float32([2, 9]))), {"squash_actions": True}),
    "clipped": ((STATE, Box(-1e-3, 1e-3, (2, 2), np.float64)), {"state_dependent_std": True}),
    "unbounded": ((STATE, Box(-np.inf, 0, (1,), np.float32)), {"activation": "gelu"}),
    "multi-discrete": ((STATE, MultiDiscrete([[2, 3], [4, 2]], start=[[1, 2], [3, 4]])), {}),
    "multi-binary": ((STATE, MultiBinary((2, 2))), {}),
    "discrete": ((Discrete(4), Discrete(3, start=7)), {"hidden": ()}),
    "masked": ((STATE, Discrete(3), True), {}),
    "mixed": ((MIXED, MultiDiscrete([2, 3])), {}),
    "images": ((Box(0, 255, (8, 9), np.uint8), ANY), {}),
    "far from zero": ((Box(1.7e9, 1.7e9 + 60, (2,), np.float64), ANY), {}),
}


def batched(values):
    """Return observations of a space as a batch of tensors."""
    if isinstance(values[0], dict):
        return {key: batched([value[key] for value in values]) for key in values[0]}
    if isinstance(values[0], tuple):
        return tuple(map(batched, zip(*values, strict=True)))
    return torch.from_numpy(np.stack(values))


def as_numpy(batch):
    if isinstance(batch, dict):
        return {key: as_numpy(value) for key, value in batch.items()}
    return tuple(map(as_numpy, batch)) if isinstance(batch, tuple) else batch.numpy()


def agent_of(case):
    spaces_, options = CASES[case]
    spaces_[0].seed(0)
    agent = TRPO(lambda: Anything(*spaces_), normalise_observations=True, **SMALL | options)
    agent.learn(128, progress=False)
    with torch.no_grad():
        for p in agent.policy.parameters():
            p += 2 * torch.randn(p.shape) * (p.ndim > 1)  # so that actions differ
    return agent


def batches_of(agent, sizes=(1, 2, 7)):
    """Return arguments of a program, and the agent's actions for them."""
    space, mask = agent.layout.space, agent.layout.info_mask
    for n in sizes:
        batch = batched([drawn(space) for _ in range(n)])
        masks = np.eye(3, dtype=np.int8)[np.arange(n) % 3] if mask else None
        expected, _ = agent.predict(as_numpy(batch), deterministic=True, action_masks=masks)
        yield (batch, *([] if masks is None else [torch.from_numpy(masks)])), expected


def assert_same_actions(actual, expected):
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)  # Box: sums in another order


def test_programs_run_without_this_package_and_act_as_the_agent(tmp_path):
    tasks, expected = [], []
    for case in CASES:
        agent = agent_of(case)
        export_policy(agent, tmp_path / f"{case}.pt2")
        arguments, actions = zip(*batches_of(agent), strict=True)
        tasks.append((str(tmp_path / f"{case}.pt2"), list(arguments)))
        expected.append(actions)
        assert len(np.unique(actions[-1])) > 1, case
    torch.save(tasks, tmp_path / "tasks")
    command = [sys.executable, "-I", "-c", ALONE, tmp_path / "tasks", tmp_path / "results"]
    subprocess.run(command, check=True, timeout=100)
    for actions, results in zip(expected, torch.load(tmp_path / "results"), strict=True):
        for mine, theirs in zip(actions, results, strict=True):
            assert_same_actions(theirs.numpy(), mine)


@pytest.mark.skipif(
    not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))), reason="needs onnx's packages"
)
@pytest.mark.filterwarnings("ignore")  # torch's exporter warns of its own deprecations
@pytest.mark.parametrize("case", CASES)
def test_onnx_files_act_as_the_agent(case, tmp_path):
    import onnxruntime

    agent = agent_of(case)
    export_policy(agent, tmp_path / "policy.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "policy.onnx")
    names = [given.name for given in session.get_inputs()]
    for arguments, expected in batches_of(agent):
        leaves = [leaf.numpy() for leaf in torch.utils._pytree.tree_leaves(arguments)]
        (actions,) = session.run(None, dict(zip(names, leaves, strict=True)))
        assert_same_actions(actions, expected)


class Own(Policy):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.9), nn.BatchNorm1d(1))

    def forward(self, rows):
        mean = self.net(rows)
        return Independent(Normal(mean, torch.ones_like(mean), validate_args=False), 1)


def test_exporting_leaves_the_agent_alone(tmp_path):
    agent = TRPO(Slide, policy=Own(), **SMALL)
    before = copy.deepcopy(agent.policy.state_dict())
    export_policy(agent, tmp_path / "policy.pt2")
    assert all(module.training for module in agent.policy.modules())
    assert all(p.requires_grad for p in agent.policy.parameters())
    assert same(list(before.values()), list(agent.policy.state_dict().values()))
    program = torch.export.load(tmp_path / "policy.pt2").module()
    for arguments, expected in batches_of(agent):
        actions = program(*arguments)
        assert not actions.requires_grad
        assert_same_actions(actions.numpy(), expected)


def test_weights_alone_say_what_they_are_of(tmp_path):
    agent = TRPO("CartPole-v1", **SMALL)
    export_weights(agent, tmp_path / "policy.safetensors")
    with safe_open(tmp_path / "policy.safetensors", "pt") as file:
        assert json.loads(file.metadata()["torch-trustregion"]) == {
            **describe(agent),
            "config": {**agent.config.to_dict(), "hidden": [8]},
        }
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # no dict
    other = TRPO("CartPole-v1", seed=1, **SMALL)
    other.policy.load_state_dict(weights)
    assert same(list(other.policy.parameters()), list(agent.policy.parameters()))


def test_what_cannot_be_exported_is_named(tmp_path, monkeypatch):
    class Words(TwoNumbers):
        def to_env(self, actions):
            return actions

    with pytest.raises(ValueError, match=r"to a file \.pt2 or \.onnx, got policy\.pth"):
        export_policy(TRPO(Clock, **SMALL), tmp_path / "policy.pth")
    with pytest.raises(ValueError, match="Words converts actions in numpy, by its own to_env"):
        export_policy(TRPO(Slide, policy=Words(copies=True), **SMALL), tmp_path / "policy.pt2")
    with pytest.raises(
        ValueError, match=r"TwoNumbers cannot be exported for batches of any size: .*2"
    ):
        export_policy(TRPO(Slide, policy=TwoNumbers(copies=True), **SMALL), tmp_path / "policy.pt2")
    monkeypatch.setattr("rl.export.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"an .onnx file needs pip install onnx onnxscript"):
        export_policy(TRPO(Clock, **SMALL), tmp_path / "policy.onnx")
    assert not list(tmp_path.iterdir())
