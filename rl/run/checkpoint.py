"""Checkpoint files: complete or refused, and never code.

A file is an uncompressed zip of ``manifest.json`` (format, version, counters, options, and the
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
from torch import Tensor, nn

FORMAT = "torch-trustregion checkpoint"
VERSION = 1
_MANIFEST, _TENSORS = "manifest.json", "tensors.safetensors"


class CheckpointError(ValueError):
    """A file that is not a complete checkpoint of this package."""


def write(path: Path, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint atomically, replacing ``path`` only once everything is on disk."""
    blob = safetensors.torch.save(
        {k: t.detach().clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}
    )  # it shares none
    head = {"format": FORMAT, "version": VERSION, "sha256": hashlib.sha256(blob).hexdigest()}
    text = json.dumps({**manifest, **head}, indent=2)
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


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return manifest and tensors of a checkpoint.

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
        return manifest, safetensors.torch.load(blob)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def flatten_optimizer(
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Split a ``state_dict`` into tensors named ``index.key`` and plain parameter groups."""
    state = optimizer.state_dict()
    tensors = {f"{i}.{key}": t for i, entry in state["state"].items() for key, t in entry.items()}
    return tensors, state["param_groups"]


def restore(
    path: str | Path,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    manifest: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Load weights and optimizer states.

    Raises:
        CheckpointError: names or shapes do not fit, as when the environment is another one.

    """
    try:
        for name, module in modules.items():
            module.load_state_dict(_within(name, tensors))
        for name, optimizer in optimizers.items():
            state: dict[int, dict[str, Tensor]] = {}
            for key, tensor in _within(name, tensors).items():
                index, _, entry = key.partition(".")
                state.setdefault(int(index), {})[entry] = tensor
            groups = manifest["optimizers"][name]
            count = sum(len(group["params"]) for group in optimizer.param_groups)
            if set(state) not in (set(), set(range(count))):  # empty before the first step
                raise KeyError(f"the state of {name} is not that of {count} parameters")
            optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} does not fit this agent: {reason}") from error


def _within(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
