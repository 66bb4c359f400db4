"""Spaces go through JSON and come back the same to the last bit."""

import json

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rl.envs.spaces_json import space_from_json, space_to_json

DTYPES = [np.float16, np.float32, np.float64, np.int8, np.int64, np.uint8, np.uint64, np.bool_]


@st.composite
def boxes(draw):
    dtype, shape = np.dtype(draw(st.sampled_from(DTYPES))), draw(hnp.array_shapes(min_dims=0))
    numbers = {"allow_nan": False} if dtype.kind == "f" else None
    arrays = hnp.arrays(dtype, shape, elements=numbers, fill=st.nothing())
    one, other = draw(arrays), draw(arrays)
    return spaces.Box(np.minimum(one, other), np.maximum(one, other), shape, dtype.type)


@st.composite
def multi_discretes(draw):
    nvec = draw(hnp.arrays(np.int64, hnp.array_shapes(max_dims=2), elements=st.integers(1, 9)))
    start = draw(hnp.arrays(np.int64, nvec.shape, elements=st.integers(-9, 9)))
    return spaces.MultiDiscrete(nvec, draw(st.sampled_from([np.int64, np.int32])), start=start)


LEAVES = st.one_of(
    boxes(),
    multi_discretes(),
    st.builds(spaces.Discrete, st.integers(1, 2**20), start=st.integers(-(2**40), 2**40)),
    st.just(spaces.Discrete(3, dtype=np.int32)),
    st.just(spaces.Box(-np.inf, np.inf, (2, 3))),
    st.builds(spaces.MultiBinary, st.integers(1, 9) | hnp.array_shapes()),
)
KEYS = st.text(max_size=3) | st.integers(0, 5)
COMPOSED = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.dictionaries(KEYS, inner, max_size=3).map(lambda d: spaces.Dict(list(d.items()))),
        st.lists(inner, max_size=3).map(spaces.Tuple),
    ),
    max_leaves=4,
)


def bits(space):
    """Return everything that tells a space, with arrays as bytes."""
    if isinstance(space, spaces.Dict):
        return [(key, bits(inner)) for key, inner in space.items()]
    if isinstance(space, spaces.Tuple):
        return [bits(inner) for inner in space]
    arrays = [getattr(space, name, None) for name in ("low", "high", "nvec", "start", "n")]
    numbers = [(x.dtype, x.tobytes()) if isinstance(x, np.ndarray) else x for x in arrays]
    return type(space), space.shape, space.dtype, numbers


@given(space=COMPOSED)
def test_round_trip(space):
    text = json.dumps(space_to_json(space), allow_nan=False)
    again = space_from_json(json.loads(text))
    assert bits(again) == bits(space)
    assert again == space


def test_a_large_box_of_equal_bounds_takes_little_space():
    image = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    assert len(json.dumps(space_to_json(image))) < 100
    zeros = spaces.Box(np.array([0.0, -0.0]), np.array([1.0, 1.0]), dtype=np.float64)
    assert bits(space_from_json(space_to_json(zeros))) == bits(zeros)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Text(3),
        spaces.Sequence(spaces.Discrete(2)),
        spaces.Dict(a=spaces.Graph(spaces.Box(-1, 1, (2,)), None)),
        spaces.Dict([((1, 2), spaces.Discrete(2))]),
        spaces.Box(-1, 1, (2,), np.longdouble),
    ],
)
def test_other_spaces_are_refused(space):
    with pytest.raises(ValueError, match="this space cannot be written as JSON"):
        space_to_json(space)


NESTED = {"kind": "Discrete", "n": 2, "start": 0}
for _ in range(5000):
    NESTED = {"kind": "Tuple", "spaces": [NESTED]}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "Text"}, "unknown kind of space 'Text'"),
        ({"kind": "Tuple", "spaces": [{"kind": "Box2"}]}, "unknown kind of space 'Box2'"),
        ({}, "not the JSON of a space"),
        (None, "not the JSON of a space"),
        ([], "not the JSON of a space"),
        ({"kind": "Discrete"}, "'n'"),
        ({"kind": "Discrete", "n": "x", "start": 0}, "not the JSON of a space"),
        ({"kind": "Discrete", "n": 3, "start": 0, "dtype": "nothing"}, "not the JSON of a space"),
        ({"kind": "Tuple", "spaces": [[]]}, "not the JSON of a space"),
        ({"kind": "Dict", "spaces": [[[], {"kind": "Discrete", "n": 3, "start": 0}]]}, "not the"),
        ({"kind": "Box", "shape": [1], "dtype": "O", "low": [0], "high": [1]}, "not the JSON"),
        ({"kind": "Box", "shape": [1], "dtype": "S9", "low": [0], "high": [1]}, "not the JSON"),
        ({"kind": "Box", "shape": [1], "dtype": "float32", "low": [], "high": [1]}, "reshape"),
        (
            {"kind": "Box", "shape": [1], "dtype": "float32", "low": [2], "high": [1]},
            "hold nothing",
        ),
        ({"kind": "Box", "shape": [1], "dtype": "float32", "low": ["nan"], "high": [1]}, "hold no"),
        (
            {"kind": "Box", "shape": [-1], "dtype": "float32", "low": [0], "high": [1]},
            "negative dim",
        ),
        ({"kind": "Discrete", "n": 2**40, "start": 0}, "a space of 8,796,093,022,208 bytes"),
        ({"kind": "MultiDiscrete", "nvec": [2**40], "start": [0]}, "a space of 8,796,093,022,208 "),
        ({"kind": "MultiBinary", "n": [2**20, 2**20]}, "a space of 8,796,093,022,208 bytes"),
        ({"kind": "Box", "shape": [2**40], "dtype": "int8", "low": [0], "high": [1]}, "a space of"),
        (NESTED, "nested too deeply"),
        ({"kind": "Box", "dtype": "float32", "shape": [3], "low": [0, 1], "high": [1]}, "reshape"),
        ({"kind": "Box", "dtype": "float32", "shape": [1], "low": ["x"], "high": [1]}, "float"),
    ],
)
def test_what_is_no_space_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        space_from_json(fields)
