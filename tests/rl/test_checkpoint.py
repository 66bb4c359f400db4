"""The file: any tree of plain values and tensors comes back, and nothing else is accepted."""

import json
import math
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rl import CheckpointError, checkpoint

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    x = x.to(draw(st.sampled_from(DTYPES)))
    kind = draw(st.sampled_from(["plain", "transposed", "expanded", "strided", "parameter"]))
    if kind == "transposed":
        x = x.movedim(0, -1) if x.ndim else x
    elif kind == "expanded":
        x = x.expand(2, *x.shape)
    elif kind == "strided":
        x = x[..., ::2] if x.ndim else x
    elif kind == "parameter" and x.is_floating_point():
        x = nn.Parameter(x)
    return x


# names that would clash, if the file did not keep them apart
keys = st.one_of(
    st.sampled_from(["a", "b", "a.b", "", ".", "0", "$tensor", "$pairs", "__metadata__", "a'"]),
    st.text(max_size=3),
    st.integers(-2, 2),
    st.booleans(),
    st.none(),
    st.floats(allow_nan=False),  # which is not equal to itself
)
plain = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), tensors()
)
trees = st.recursive(
    plain,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)),
    max_leaves=8,
)


def alike(a, b):
    if isinstance(a, torch.Tensor):
        return (
            type(b) is torch.Tensor
            and (a.dtype, a.shape) == (b.dtype, b.shape)
            and bool((a == b).all())
        )
    if isinstance(a, dict):
        # 1 and True are one key of a dict, so that types are compared beside values
        own, other = ([(type(k), k) for k in x] for x in (a, b))
        return type(b) is dict and own == other and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(b) is list and len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return type(a) is type(b) and a == b and str(a) == str(b)  # -0.0 is not 0.0


@given(st.dictionaries(keys, trees, max_size=4))
def test_any_tree_of_plain_values_and_tensors_comes_back(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("tree") / "state.zip"
    checkpoint.write(path, state)
    assert alike(state, checkpoint.read(path))


def test_what_shares_memory_comes_back_apart(tmp_path):
    x = torch.arange(6.0)
    state = {"whole": x, "part": x[2:4], "again": x, "list": [x, x[::2]], "tied": {1: x}}
    checkpoint.write(tmp_path / "state.zip", state)
    back = checkpoint.read(tmp_path / "state.zip")
    assert alike(state, back)
    back["whole"][:] = 0
    assert alike(x, back["again"])
    assert x[1] == 1


def test_tuples_come_back_as_lists(tmp_path):
    checkpoint.write(tmp_path / "state.zip", {"a": (1, (2.5, None))})
    assert checkpoint.read(tmp_path / "state.zip") == {"a": [1, [2.5, None]]}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a": {"b": object()}}, r"a\.b is a object, which a checkpoint cannot hold"),
        ({"a": [1, {2, 3}]}, r"a\.1 is a set"),
        ({"a": np.zeros(2)}, "a is a ndarray"),
        ({"a": np.float32(1.0)}, "a is a float32"),
        ({"a": 1j}, "a is a complex"),
        ({"a": b"bytes"}, "a is a bytes"),
        ({"a": nn.Linear(1, 1)}, "a is a Linear"),
        ({"a": torch.eye(2).to_sparse()}, "a is a Tensor"),
        ({"a": {(1, 2): 3}}, r"a has a key \(1, 2\)"),
    ],
)
def test_other_values_are_refused_and_write_nothing(state, words, tmp_path):
    with pytest.raises(TypeError, match=words):
        checkpoint.write(tmp_path / "state.zip", state)
    assert not list(tmp_path.iterdir())


# -- files


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "folder" / "state.zip"  # which is made
    checkpoint.write(path, {"x": torch.randn(50), "n": 3, "name": "one"})
    return path


def test_every_truncation_is_refused(file, tmp_path):
    whole, cut = file.read_bytes(), tmp_path / "cut.zip"
    for size in [0, 1, 100, *range(150, len(whole), 37), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.zip is not a complete"):
            checkpoint.read(cut)


def test_every_bit_flip_is_refused_or_harmless(file, tmp_path):
    """Flips in names or dates of the zip change nothing that is read; all others are refused."""
    expected, whole = checkpoint.read(file), file.read_bytes()
    flipped, refused = tmp_path / "flipped.zip", 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        flipped.write_bytes(damaged)
        try:
            assert alike(expected, checkpoint.read(flipped))
        except CheckpointError:
            refused += 1
    assert refused >= 0.85 * len(whole)  # of so small a file the headers are a good part


def entries(path):
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("manifest.json")), archive.read("tensors.safetensors")


def write_entries(path, manifest, tensors):
    with zipfile.ZipFile(path, "w") as archive:  # a valid zip, with valid CRCs
        archive.writestr("manifest.json", json.dumps(manifest))
        archive.writestr("tensors.safetensors", tensors)


def test_tensors_that_do_not_match_their_checksum_are_refused(file, tmp_path):
    manifest, tensors = entries(file)
    changed = tensors[:-1] + bytes([tensors[-1] ^ 1])
    write_entries(tmp_path / "changed.zip", manifest, changed)
    with pytest.raises(CheckpointError, match="do not match its checksum"):
        checkpoint.read(tmp_path / "changed.zip")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 99}, "version 99, this release reads"),
        ({"version": None}, "version None"),
        ({"format": "x"}, "another program"),
        ({"state": {"x": {"$tensor": "no such"}}}, "damaged"),
        ({"state": {"$pairs": 3}}, "damaged"),
    ],
)
def test_manifests_of_another_kind_are_refused(file, tmp_path, changes, words):
    manifest, tensors = entries(file)
    write_entries(tmp_path / "changed.zip", manifest | changes, tensors)
    with pytest.raises(CheckpointError, match=words):
        checkpoint.read(tmp_path / "changed.zip")


def test_files_of_other_programs_are_refused(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "theirs.zip")
    (tmp_path / "words.txt").write_text("hello")
    for name in ("theirs.zip", "words.txt"):
        with pytest.raises(CheckpointError, match="another program"):
            checkpoint.read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoint.read(tmp_path / "absent.zip")


def test_files_are_as_readable_as_other_files(file):
    (file.parent / "other").touch()
    assert file.stat().st_mode == (file.parent / "other").stat().st_mode


def test_a_failed_write_keeps_the_previous_file(file, monkeypatch):
    before = file.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write(file, {"x": 4})
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name]
