"""Checkpoint files: complete or refused, and never code.

A file is an uncompressed zip of ``manifest.json`` (format, version, a tree of plain values, and the
SHA-256 of the tensors) and ``tensors.safetensors``. ``torch.load`` does not check its own
checksums, and pickle runs code; this format does neither. It is written beside its destination and
moved there in one step, so that an interrupted save leaves the previous file.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

FORMAT = "torch-trustregion checkpoint"
VERSION = 2
_MANIFEST, _TENSORS = "manifest.json", "tensors.safetensors"
_TENSOR, _PAIRS = "$tensor", "$pairs"  # what stands for a tensor, and for a dict of other keys


class CheckpointError(ValueError):
    """A file that is not a complete checkpoint of this package."""


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically, replacing ``path`` only once everything is on disk.

    Args:
        path: the file; its folder is made.
        state: dicts, lists, numbers, strings, None and tensors, nested to any depth.

    Raises:
        TypeError: a value of another type.

    """
    tensors: dict[str, Tensor] = {}
    tree = _plain(state, "", tensors)
    blob = safetensors.torch.save(tensors)
    head = {"format": FORMAT, "version": VERSION, "sha256": hashlib.sha256(blob).hexdigest()}
    text = json.dumps({**head, "state": tree}, indent=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # as a file opened in the ordinary way
        with os.fdopen(handle, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                archive.writestr(_MANIFEST, text)
                archive.writestr(_TENSORS, blob)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read(path: Path) -> dict[str, Any]:
    """Return what :func:`write` was given; tuples come back as lists.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated, damaged, of another program or a newer version.

    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            manifest = json.loads(archive.read(_MANIFEST))
            blob = archive.read(_TENSORS)  # zipfile checks the CRC
    except Exception as error:  # zipfile raises a dozen types for damaged headers
        raise CheckpointError(
            f"{path} is not a complete {FORMAT}: it is truncated, damaged or of another program"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a {FORMAT}: another program wrote it")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {manifest.get('version')}, this release reads {VERSION}"
        )
    if hashlib.sha256(blob).hexdigest() != manifest.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its contents do not match its checksum")
    try:
        return _full(manifest["state"], safetensors.torch.load(blob))
    except (safetensors.SafetensorError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error


def _plain(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """Return a tree of values that JSON has; tensors move out of it, by their places."""
    if isinstance(value, Tensor) and value.layout is torch.strided:
        while place in tensors:  # "a.b" may be a key of its own
            place += "'"
        # a copy shares no memory with others, which safetensors refuses
        tensors[place] = value.detach().clone(memory_format=torch.contiguous_format)
        return {_TENSOR: place}
    if isinstance(value, Mapping):
        inner = {k: _plain(v, f"{place}.{k}", tensors) for k, v in value.items()}
        odd = [k for k in inner if not (k is None or isinstance(k, bool | int | float | str))]
        if odd:
            raise TypeError(f"{place} has a key {odd[0]!r}, which a checkpoint cannot hold")
        as_it_is = all(isinstance(k, str) for k in inner) and not inner.keys() & {_TENSOR, _PAIRS}
        return inner if as_it_is else {_PAIRS: [*inner.items()]}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{place}.{i}", tensors) for i, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{place} is a {type(value).__name__}, which a checkpoint cannot hold")


def _full(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_full(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_TENSOR}:
        return tensors[value[_TENSOR]]
    pairs = value[_PAIRS] if value.keys() == {_PAIRS} else value.items()
    return {key: _full(item, tensors) for key, item in pairs}
