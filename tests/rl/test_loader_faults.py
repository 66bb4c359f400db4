"""Damaged and forged checkpoints: the documented error, in little memory, or a sound agent."""

import copy
import json
import random
import resource
import warnings
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import forged as forge
from agents import SMALL
from rl import PPO, TRPO, CheckpointError, checkpoint, load

pytestmark = pytest.mark.filterwarnings("ignore")  # gymnasium's, of odd bounds


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return the checkpoints of a few agents, and a path for what is made of them."""
    folder = tmp_path_factory.mktemp("faults")
    options = {"normalise_rewards": True, "normalise_observations": True}
    made = {
        "trpo": TRPO("CartPole-v1", **options, **SMALL),
        "ppo": PPO("Pendulum-v1", squash_actions=True, **SMALL),
        "lbfgs": TRPO("MountainCar-v0", critic_fit="lbfgs", shared_encoder=False, **SMALL),
    }
    for name, agent in made.items():
        agent.learn(64, progress=False).save(folder / f"{name}.zip")
    return [folder / f"{name}.zip" for name in made], folder / "forged.zip"


def outcome(path):
    """Load a file; return what came of it, which is the documented error or an agent."""
    try:
        agent = load(path)
    except CheckpointError as error:
        words = str(error)
        return "refused" if words.startswith(str(path)) and "\n" not in words else words
    assert all(p.isfinite().all() for p in agent.policy.parameters())
    assert not agent.has_envs
    agent.predict(np.zeros(agent.layout.space.shape), deterministic=True)
    return "loaded"


# -- damage


def damaged(data, chance):
    """Return bytes with a few bits flipped, cut off, doubled, zeroed, or moved."""
    data, start = bytearray(data), chance.randrange(len(data))
    length = chance.randrange(1, 1 + min(512, len(data) - start))
    match kind := chance.choice(["flip", "flips", "cut", "zero", "doubled", "removed"]):
        case "flip" | "flips":
            for _ in range(1 if kind == "flip" else 8):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        case "cut":
            del data[start:]
        case "zero":
            data[start : start + length] = bytes(length)
        case "doubled":
            data[start:start] = data[start : start + length]
        case "removed":
            del data[start : start + length]
    return kind, bytes(data)


@given(seed=st.integers(0, 2**32))
def test_damage_is_refused(files, seed):
    paths, path = files
    chance = random.Random(seed)
    whole = chance.choice(paths).read_bytes()
    _, data = damaged(whole, chance)
    if data != whole:  # two flips may meet, and zeros may be there already
        path.write_bytes(data)
        assert outcome(path) == "refused"


# -- forgeries

JUNK = [
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, 2**70, -(2**70), 1e308, -1e308, 1e-320),
    *(float("nan"), float("inf"), -0.0, "", "x", "cpu", "meta", "cuda:99", "own:x", "$tensor"),
    *([], [[]], [1], [2**40], ["x"], [None] * 9, [[[[]]]], {}, {"a": {}}, {1: 2}, {None: 1.5}),
    *(torch.zeros(0), torch.zeros(()), torch.ones(3), torch.full((2, 2), torch.nan)),
    *(torch.zeros(4).double(), torch.zeros(2, dtype=torch.int64), torch.zeros(5000).byte()),
    *(torch.zeros(2, dtype=torch.complex64), torch.zeros(3).bool(), torch.zeros(2).bfloat16()),
]


def places(value, path=()):
    """Yield the paths of all values within a tree."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def forge_state(state, chance):
    """Change a few values of a tree: others, none, those of another place, or more of them."""
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        known = list(places(state))
        if not known:
            break
        *outer, last = chance.choice(known)
        inner = state
        for key in outer:
            inner = inner[key]
        match chance.choice(["junk", "junk", "remove", "move", "add", "scale"]):
            case "junk":
                inner[last] = copy.deepcopy(chance.choice(JUNK))
            case "remove":
                del inner[last]
            case "move":
                source, path = state, chance.choice(known)
                for key in path:
                    source = source[key]
                inner[last] = copy.deepcopy(source)
            case "add" if isinstance(inner, dict):
                inner[chance.choice(["x", "y", 0, 7, None])] = chance.choice(JUNK)
            case "scale" if isinstance(inner[last], int | float | torch.Tensor):
                inner[last] = inner[last] * chance.choice([-1, 0, 2, 1000, 2**40])
    return state


def forged(paths, path, chance):
    """Write a checkpoint whose checksums are right."""
    checkpoint.write(path, forge_state(checkpoint.read(chance.choice(paths)), chance))


@given(seed=st.integers(0, 2**32))
def test_forged_states_are_refused_or_load_as_sound_agents(files, seed):
    paths, path = files
    forged(paths, path, random.Random(seed))
    assert outcome(path) in ("refused", "loaded")


MEMBERS = st.lists(
    st.tuples(
        st.sampled_from([*forge.MEMBERS, *forge.MEMBERS, "x", "/etc/passwd", "../x", ""]),
        st.binary(max_size=40) | st.sampled_from([b"{}", b"[]", b"null", bytes(8)]),
    ),
    max_size=4,
)


@given(MEMBERS, st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
def test_archives_of_anything_are_refused(files, members, compression):
    with warnings.catch_warnings(action="ignore"):  # of duplicate names
        files[1].write_bytes(forge.archive(members, compression))
    assert outcome(files[1]) == "refused"


@given(state=st.binary(max_size=60), tensors=st.binary(max_size=60), seed=st.integers(0, 2**32))
def test_members_of_other_files_are_refused(files, state, tensors, seed):
    """Each member is of one file, or of none; the checksums are right."""
    paths, path = files
    chance = random.Random(seed)
    one, other = (forge.members(chance.choice(paths)) for _ in range(2))
    members = chance.choice([(one, other), (one, {forge.MEMBERS[2]: tensors}), (None, other)])
    blob = members[1][forge.MEMBERS[2]]
    path.write_bytes(forge.checkpoint(members[0][forge.MEMBERS[1]] if members[0] else state, blob))
    whole = members[0] is not None and members[0][forge.MEMBERS[2]] == blob
    assert outcome(path) == ("loaded" if whole else "refused")


@given(
    st.recursive(
        st.none() | st.integers() | st.floats() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
def test_manifests_of_anything_are_refused(files, manifest):
    one = forge.members(files[0][0])
    members = one | {forge.MEMBERS[0]: json.dumps(manifest).encode()}
    files[1].write_bytes(forge.archive(members.items()))
    assert outcome(files[1]) == "refused"


# -- the same, many times


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_many_damaged_and_forged_files(files, capsys):
    (paths, path), chance, counts = files, random.Random(0), Counter()
    outcome(paths[0])
    before = peak_memory()
    while sum(n for (kind, _), n in counts.items() if kind != "forged") < 3000:
        whole = chance.choice(paths).read_bytes()
        kind, data = damaged(whole, chance)
        if data != whole:
            path.write_bytes(data)
            counts[kind, outcome(path)] += 1
    assert not any(result == "loaded" for _, result in counts)
    while counts["forged", "refused"] + counts["forged", "loaded"] < 3000:
        forged(paths, path, chance)
        counts["forged", outcome(path)] += 1
    assert {result for _, result in counts} == {"refused", "loaded"}
    grown = peak_memory() - before
    with capsys.disabled():
        lines = (f"{kind}: {n} {result}" for (kind, result), n in sorted(counts.items()))
        print(*lines, f"peak memory: {grown / 2**20:.0f} MiB more", sep="\n")  # a report
    assert grown < 2**28
