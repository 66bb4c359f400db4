"""What may be passed as observations, and what is said of the rest."""

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, Tuple

from rl.envs.batches import as_batch

BOX, DISCRETE = Box(-1, 1, (2,)), Discrete(3)
DICT, PAIR = Dict(a=BOX, b=DISCRETE), Tuple((BOX, DISCRETE))
ONE = np.zeros(2)


@pytest.mark.parametrize(
    ("space", "obs", "single"),
    [
        (BOX, [0.5, 1], True),
        (BOX, np.zeros((4, 2)), False),
        (BOX, torch.zeros(4, 2, requires_grad=True), False),
        (BOX, np.zeros((0, 2)), False),
        (DISCRETE, 2, True),
        (DISCRETE, np.array([2, 1]), False),
        (DICT, {"a": ONE, "b": 1, "unknown": "x"}, True),
        (DICT, {"a": np.zeros((3, 2)), "b": [0, 1, 2]}, False),
        (PAIR, (ONE, 1), True),
        (PAIR, [np.zeros((3, 2)), [0, 1, 2]], False),
        (Tuple((DISCRETE, DICT)), (1, {"a": ONE, "b": 1}), True),
        (Dict(pair=PAIR), {"pair": (ONE, 1)}, True),
    ],
)
def test_one_observation_or_a_batch(space, obs, single):
    batch, was_single = as_batch(space, obs)
    assert was_single == single

    def check(space, obs, batch):
        if isinstance(space, Dict):
            return all(check(inner, obs[key], batch[key]) for key, inner in space.items())
        if isinstance(space, Tuple):
            return all(map(check, space, obs, batch))
        expected = np.asarray(obs.detach() if isinstance(obs, torch.Tensor) else obs)
        return np.array_equal(expected[None] if single else expected, batch)

    assert check(space, obs, batch)


@pytest.mark.parametrize("space", [BOX, DISCRETE, DICT, PAIR, Tuple((BOX, BOX, BOX))])
@pytest.mark.parametrize("info", [{}, {"action_mask": [1]}])
def test_what_reset_returns_is_told_apart(space, info):
    for obs in (space.sample(), np.zeros((4, 2))):
        with pytest.raises(ValueError, match=r"\(observation, info\).*predict\(env.reset\(\)\[0"):
            as_batch(space, (obs, info))


@pytest.mark.parametrize(
    ("space", "obs", "words"),
    [
        (BOX, np.zeros(3), r"obs must have shape \(2,\) or \(batch, 2\), got \(3,\)"),
        (DISCRETE, np.zeros((2, 2)), r"obs must have shape \(\) or \(batch\), got \(2, 2\)"),
        (BOX, 1.0, "obs must have shape"),
        (BOX, [[1, 2], [3]], r"obs must be numbers of shape \(2,\), got \[\[1, 2\], \[3\]\]"),
        (BOX, None, "obs must be numbers"),
        (BOX, ["a", "b"], "obs must be numbers"),
        (BOX, {"a": ONE}, "obs must be numbers"),
        (DISCRETE, "left", "obs must be numbers"),
        (DICT, {"a": ONE}, r"obs must be a dict with the keys \['a', 'b'\], got the keys \['a'\]"),
        (DICT, ONE, "obs must be a dict with the keys"),
        (DICT, {"a": np.zeros(3), "b": 1}, r"obs\['a'\] must have shape"),
        (DICT, {"a": np.zeros((3, 2)), "b": [1, 2]}, r"of one size.*'a'.*: 3.*'b'.*: 2"),
        (DICT, {"a": np.zeros((3, 2)), "b": 1}, "of one size"),
        (PAIR, (ONE,), "obs must be a tuple of length 2, got"),
        (PAIR, ONE, "obs must be a tuple of length 2"),
        (PAIR, (ONE, [[1]]), r"obs\[1\] must have shape"),
        (Dict(pair=PAIR), {"pair": (1, 2)}, r"obs\['pair'\]\[0\] must have shape"),
        (Tuple((DISCRETE, DICT)), ((1, {"a": ONE, "b": 1}), {}), r"obs\[0\] must be numbers"),
    ],
)
def test_anything_else_is_named(space, obs, words):
    with pytest.raises(ValueError, match=words):
        as_batch(space, obs)
