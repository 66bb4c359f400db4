"""The file: any tree of plain values and tensors comes back, and nothing else is accepted."""

import json
import math
import os
import socket
import stat
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import forged as forge
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


@pytest.mark.parametrize(
    "keys",
    [
        [("a.b",), ("a", "b")],
        [(1,), ("1",)],
        [(True,), (1.5,), (None,)],
        [("", "a"), ("a",)],
        [("__metadata__",)],
        [("$tensor",)],
        [("a", "$pairs")],
        [("a'",), ("a",), ("b", "$tensor")],
    ],
)
def test_keys_that_could_clash_are_kept_apart(keys, tmp_path):
    state = {}
    for i, (*outer, last) in enumerate(keys):
        inner = state
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = torch.full((2,), i)
    checkpoint.write(tmp_path / "state.zip", state)
    assert alike(state, checkpoint.read(tmp_path / "state.zip"))


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


def test_equal_states_make_equal_files(file, tmp_path):
    checkpoint.write(tmp_path / "again.zip", checkpoint.read(file))
    assert (tmp_path / "again.zip").read_bytes() == file.read_bytes()


def test_every_truncation_is_refused(file, tmp_path):
    whole, cut = file.read_bytes(), tmp_path / "cut.zip"
    for size in [0, 1, 100, *range(150, len(whole), 37), len(whole) - 65, len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.zip is (not a complete|damaged)"):
            checkpoint.read(cut)


def test_every_bit_flip_is_refused(file, tmp_path):
    whole, flipped = file.read_bytes(), tmp_path / "flipped.zip"
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        flipped.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"flipped\.zip is (not a complete|damaged)"):
            checkpoint.read(flipped)


def test_what_is_added_or_spliced_is_refused(file, tmp_path):
    checkpoint.write(tmp_path / "other.zip", {"x": torch.zeros(50), "n": 3, "name": "one"})
    one, other = (path.read_bytes() for path in (file, tmp_path / "other.zip"))
    assert len(one) == len(other)
    half = len(one) // 2
    for data in (one + b"x", b"x" + one, one + one, one[:half] + other[half:]):
        (tmp_path / "spliced.zip").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"spliced\.zip "):
            checkpoint.read(tmp_path / "spliced.zip")


def version_2(file):
    """Write the manifest of a file of before, with the state in it."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("manifest.json", json.dumps({"format": checkpoint.FORMAT, "version": 2}))
        archive.writestr("tensors.safetensors", b"")


def whole(state=None, tensors=None, **head):
    """Return a function from a checkpoint's members to one with some of them changed."""
    return lambda m: forge.checkpoint(state or m[1], tensors or m[2], **head)


def zipped(change, **options):
    """Return a function from a checkpoint's members to an archive of others."""
    return lambda m: forge.archive(change([*zip(forge.MEMBERS, m, strict=True)]), **options)


DEFLATED = {"compression": zipfile.ZIP_DEFLATED}
MANIFEST, STATE, TENSORS = forge.MEMBERS
DEEP = b'{"a":' * 100_000 + b"0" + b"}" * 100_000
FORGED = {
    "another program's": (whole(format="x"), "is not a .* another program wrote it"),
    "version 99": (whole(version=99), "has format version 99, and this release reads 3: a newer"),
    "no version": (whole(version=None), "has format version None"),
    "version true": (whole(version=True), "has format version True"),
    "other checksums": (
        whole(sha256={STATE: 2, TENSORS: 1}),
        r"is damaged: state\.json does not match its checksum",
    ),
    "no checksums": (whole(sha256=[1]), "is not a complete"),
    "compressed": (zipped(list, **DEFLATED), r"compressed or encrypted member 'manifest\.json'"),
    "a bomb": (
        zipped(lambda _: [(MANIFEST, bytes(2**28))], **DEFLATED),
        r"compressed or encrypted member 'manifest\.json'",
    ),
    "a member more": (zipped(lambda m: [*m, ("../../etc/passwd", b"x")]), "the members .*passwd"),
    "two manifests": (zipped(lambda m: [*m, m[0]]), r"two members of the name 'manifest\.json'"),
    "a member less": (zipped(lambda m: m[:2]), "has the members .*, which are not those"),
    "many members": (
        zipped(lambda m: [*m, *((str(i), b"") for i in range(5000))]),
        "has a directory of more members than",
    ),
    "a long state": (
        whole(b" " * (2**24 + 1)),
        r"has 16,777,217 bytes in 'state\.json', and 16,777,216 are read",
    ),
    "nested": (whole(DEEP), "RecursionError"),
    "NaN": (whole(b'{"n": NaN}'), "NaN is no number of JSON"),
    "1e999": (whole(b'{"n": 1e999}'), "1e999 is no number of JSON"),
    "a long number": (whole(b'{"n": ' + b"9" * 10**5 + b"}"), "digits"),
    "a name twice": (whole(b'{"n": 1, "n": 2}'), "a name is there twice"),
    "a key twice": (whole(b'{"$pairs": [[1, 2], [1, 3]]}'), "a key is there twice"),
    "a float of words": (whole(b'{"n": {"$float": "1"}}'), "KeyError: '1'"),
    "no mapping": (whole(b'{"$tensor": ".x"}'), "its state is no mapping"),
    "an unknown tensor": (whole(b'{"x": {"$tensor": "no such"}}'), "KeyError: 'no such'"),
    "a tensor twice": (
        whole(b'{"x": {"$tensor": ".x"}, "y": {"$tensor": ".x"}}'),
        r"KeyError: '\.x'",
    ),
    "an unused tensor": (whole(b"{}"), r"nothing refers to the tensor '\.x'"),
    "pairs that are none": (whole(b'{"$pairs": 3}'), "TypeError"),
    "a key that is a list": (whole(b'{"$pairs": [[[1], 3]]}'), "unhashable"),
    "more tensors than bytes": (
        lambda m: forge.checkpoint(m[1], m[2][:-1]),
        "SafetensorError",
    ),
    "a long header": (
        lambda m: forge.checkpoint(m[1], (2**30).to_bytes(8, "little") + m[2][8:]),
        "has more tensors than are read",
    ),
}


@pytest.mark.parametrize("kind", FORGED)
@pytest.mark.filterwarnings("ignore:Duplicate name")  # zipfile's, of the file that is made here
def test_forged_files_are_refused_in_little_memory(file, tmp_path, kind):
    make, words = FORGED[kind]
    path = tmp_path / "forged.zip"
    path.write_bytes(make([*forge.members(file).values()]))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=words) as caught:
            checkpoint.read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(f"{path} ")
    assert peak < 2**22 + 10 * path.stat().st_size


def test_a_file_of_before_says_who_reads_it(tmp_path):
    version_2(tmp_path / "old.zip")
    with pytest.raises(
        CheckpointError, match=r"version 2, and .* reads 3: the state of .* 0\.1\.0"
    ):
        checkpoint.read(tmp_path / "old.zip")


def test_a_file_without_its_checksum_is_refused(file, tmp_path):
    with zipfile.ZipFile(tmp_path / "bare.zip", "w") as archive:
        for name, data in forge.members(file).items():
            archive.writestr(name, data)
    with pytest.raises(CheckpointError, match="is damaged: it lacks its checksum"):
        checkpoint.read(tmp_path / "bare.zip")


def test_files_of_other_programs_are_refused(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "theirs.zip")
    (tmp_path / "words.txt").write_text("hello")
    for name in ("theirs.zip", "words.txt"):
        with pytest.raises(CheckpointError, match="another program"):
            checkpoint.read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoint.read(tmp_path / "absent.zip")


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "socket"))
    for path in (tmp_path / "pipe", tmp_path / "socket", tmp_path, Path("/dev/zero")):
        with pytest.raises(CheckpointError, match=f"{path} is a folder or a device"):
            checkpoint.read(path)


def test_values_that_could_not_be_read_again_are_not_written(file):
    before = file.read_bytes()
    with pytest.raises(ValueError, match="keep long lists of numbers as tensors"):
        checkpoint.write(file, {"a": "x" * 2**24})
    assert file.read_bytes() == before


def test_the_newest_that_is_whole_is_loaded(file, tmp_path):
    damaged, absent = tmp_path / "damaged.zip", tmp_path / "absent.zip"
    damaged.write_bytes(file.read_bytes()[:-1])
    state, path, wrong = checkpoint.load_newest([absent, damaged, file, absent], checkpoint.read)
    assert (state["n"], path) == (3, file)
    assert [str(p) in words for p, words in zip((absent, damaged), wrong, strict=True)] == [
        True
    ] * 2
    with pytest.raises(
        CheckpointError, match=r"no checkpoint to load; .*damaged\.zip .*; .*absent"
    ):
        checkpoint.load_newest([damaged, absent], checkpoint.read)


def test_files_are_as_readable_as_other_files(file):
    (file.parent / "other").touch()
    assert file.stat().st_mode == (file.parent / "other").stat().st_mode


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_keeps_the_previous_file(file, monkeypatch, fault, call):
    before = file.read_bytes()

    def failing(*_):
        raise fault

    monkeypatch.setattr(f"os.{call}", failing)
    words = rf"cannot write {file}, which is as it was before: No space"
    with pytest.raises(type(fault), match=words if isinstance(fault, OSError) else None) as caught:
        checkpoint.write(file, {"x": 4})
    assert isinstance(caught.value, KeyboardInterrupt) or caught.value.errno == 28
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_an_interrupt_after_the_move_is_raised_as_it_is(file, monkeypatch):
    replace = os.replace

    def interrupted(*names):
        replace(*names)
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(file, {"x": 4})
    assert checkpoint.read(file) == {"x": 4}


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write .*state\.zip, which is as it was before"):
        checkpoint.write(tmp_path / "file" / "state.zip", {})


def test_the_folder_is_on_disk_after_the_move(file, monkeypatch):
    """A power cut would undo the move otherwise."""
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda fd: (done.append(stat_of(fd)), fsync(fd)))
    monkeypatch.setattr("os.replace", lambda *names: (done.append("move"), replace(*names)))
    checkpoint.write(file, {"x": 4})
    assert done == ["file", "move", "folder"]


def stat_of(descriptor):
    return "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"


def test_what_killed_processes_left_is_removed_after_an_hour(file):
    names = [f".{file.name}.{i}.tmp" for i in range(3)] + [f".other{file.name}.0.tmp"]
    for name, age in zip(names, (4000, 3500, 0, 4000), strict=True):
        (file.parent / name).touch()
        os.utime(file.parent / name, (time.time() - age,) * 2)
    checkpoint.write(file, {"x": 4})
    assert sorted(p.name for p in file.parent.iterdir()) == sorted([file.name, *names[1:]])
