"""Checkpoint files: complete or refused, and never code.

A file is a zip of three members, none compressed:

- ``manifest.json``: format, version, and the SHA-256 of the two others,
- ``state.json``: a tree of plain values, in which places stand for tensors (see json_tree.py),
- ``tensors.safetensors``: the tensors, by their places.

The archive's comment is the SHA-256 of everything before it, so that no bit can change unseen.
``torch.load`` does not check its own checksums, and pickle runs code; this format does neither.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

import safetensors.torch

from .files import replace_file
from .json_tree import from_json, parse_json, to_json

T = TypeVar("T")
FORMAT = "torch-trustregion checkpoint"
VERSION = 3
_MANIFEST, _STATE, _TENSORS = "manifest.json", "state.json", "tensors.safetensors"
_DIGEST = 64  # characters of a SHA-256
_MOST_JSON = 2**24  # bytes; lists and dicts in memory are twenty times as large
_MOST_ENTRIES = 2**17  # bytes of the zip's directory; three entries take a few hundred


class CheckpointError(ValueError):
    """A file that is not a complete checkpoint of this package."""


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically, replacing ``path`` only once everything is on disk.

    Equal states make equal files, byte for byte.

    Args:
        path: the file; its folder is made.
        state: dicts, lists, numbers, strings, None and tensors, nested to any depth.

    Raises:
        TypeError: a value of another type.
        ValueError: the values beside the tensors are too many for a file that can be read.
        OSError: the file cannot be written; what was there before is unchanged.

    """
    tree, tensors = to_json(state)
    if len(tree) > _MOST_JSON:
        raise ValueError(
            f"the values beside the tensors take {len(tree):,} bytes, and a checkpoint holds"
            f" {_MOST_JSON:,}: keep long lists of numbers as tensors"
        )
    members = {_STATE: tree, _TENSORS: safetensors.torch.save(tensors)}
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}
    head = json.dumps({"format": FORMAT, "version": VERSION, "sha256": digests}, indent=2)
    replace_file(path, lambda file: _write_archive(file, {_MANIFEST: head.encode()} | members))


def _write_archive(file: IO[bytes], members: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)  # of no date, so that files repeat
        archive.comment = bytes(_DIGEST)
    digest = _digest_before_comment(file)
    file.seek(-_DIGEST, os.SEEK_END)
    file.write(digest)


def _digest_before_comment(file: IO[bytes]) -> bytes:
    left, digest = file.seek(0, os.SEEK_END) - _DIGEST, hashlib.sha256()
    file.seek(0)
    while left > 0 and (data := file.read(min(left, 2**20))):
        digest.update(data)
        left -= len(data)
    return digest.hexdigest().encode()


def read(path: Path) -> dict[str, Any]:
    """Return what :func:`write` was given; tuples come back as lists.

    Everything is verified before anything is returned. Memory is a small multiple of the file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated, damaged, of another program or another version.
        OSError: the file cannot be opened.

    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if not path.is_file():
        raise CheckpointError(f"{path} is a folder or a device, and a checkpoint is a file")
    with open(path, "rb") as file:
        try:
            return _verified(file)
        except CheckpointError as error:
            raise CheckpointError(f"{path} {error}") from error.__cause__
        except MemoryError:
            raise
        except Exception as error:  # damaged headers fail in the libraries in dozens of ways
            raise CheckpointError(
                f"{path} is not a complete {FORMAT}: it is truncated, damaged or of another"
                f" program ({_words(error)})"
            ) from error


def load_newest(paths: Iterable[Path], load: Callable[[Path], T]) -> tuple[T, Path, list[str]]:
    """Return the first of some files that can be loaded, and what was wrong with those before it.

    Args:
        paths: files, the newest first.
        load: what is tried on each, such as :func:`read`.

    Returns:
        What ``load`` returned, of which file, and a sentence for each file that was passed over.

    Raises:
        CheckpointError: none can be loaded; says what is wrong with each.

    """
    wrong: list[str] = []
    for path in paths:
        try:
            return load(path), path, wrong
        except (CheckpointError, OSError) as error:
            wrong.append(str(error))
    raise CheckpointError("; ".join(["there is no checkpoint to load", *wrong]))


def _verified(file: IO[bytes]) -> dict[str, Any]:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _DIGEST))
    digest = file.read()
    sealed = re.fullmatch(rb"[0-9a-f]{64}", digest) is not None
    if sealed and digest != _digest_before_comment(file):
        raise CheckpointError("is damaged: its bytes do not match their checksum")
    bounded: Any = _Bounded(file)
    with zipfile.ZipFile(bounded) as archive:
        bounded.most = size
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if _MANIFEST not in names:
            raise CheckpointError(f"is not a {FORMAT}: another program wrote it")
        for entry in entries:
            _check_entry(entry, names, size)
        manifest = parse_json(archive.read(_MANIFEST))
        _check_manifest(manifest)
        if not sealed:
            raise CheckpointError("is damaged: it lacks its checksum")
        if sorted(names) != [_MANIFEST, _STATE, _TENSORS]:
            raise CheckpointError(f"has the members {names}, which are not those of a {FORMAT}")
        members = {name: archive.read(name) for name in (_STATE, _TENSORS)}
    for name, data in members.items():
        if hashlib.sha256(data).hexdigest() != manifest["sha256"][name]:
            raise CheckpointError(f"is damaged: {name} does not match its checksum")
    return _decoded(members[_STATE], members[_TENSORS])


class _Bounded:
    """A file that reads a limited number of bytes at once: a forged directory may be endless."""

    most = _MOST_ENTRIES

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self.most + 1 if size < 0 else min(size, self.most + 1))
        if len(data) > self.most:
            raise CheckpointError("has a directory of more members than a checkpoint has")
        return data


def _check_entry(entry: zipfile.ZipInfo, names: list[str], size: int) -> None:
    name = entry.filename
    if names.count(name) > 1:
        raise CheckpointError(f"has two members of the name {name!r}")
    stored = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
    if not stored or entry.flag_bits & 1:
        raise CheckpointError(f"has a compressed or encrypted member {name!r}, which is not read")
    most = size if name == _TENSORS else min(size, _MOST_JSON)
    if entry.file_size > most:
        raise CheckpointError(f"has {entry.file_size:,} bytes in {name!r}, and {most:,} are read")


def _check_manifest(manifest: Any) -> None:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"is not a {FORMAT}: another program wrote it")
    version = manifest.get("version")
    if version in (1, 2):
        raise CheckpointError(
            f"has format version {version}, and this release reads {VERSION}: the state of"
            " torch-trustregion 0.1.0 that wrote it reads it"
        )
    if version != VERSION or isinstance(version, bool):
        raise CheckpointError(
            f"has format version {version!r:.40}, and this release reads {VERSION}: a newer"
            " release may have written it"
        )


def _decoded(tree: bytes, blob: bytes) -> dict[str, Any]:
    if int.from_bytes(blob[:8], "little") > _MOST_JSON:
        raise CheckpointError("has more tensors than are read")
    tensors = safetensors.torch.load(blob)
    state = from_json(tree, tensors)
    if not isinstance(state, dict):
        raise CheckpointError("is damaged: its state is no mapping")
    return state


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
