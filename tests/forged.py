"""Checkpoint files that look whole to their checksums, and were not written by this package."""

import hashlib
import io
import json
import zipfile

MEMBERS = ("manifest.json", "state.json", "tensors.safetensors")


def members(path):
    """Return the contents of a checkpoint's members by name."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def sealed(data):
    """Return bytes whose last 64 are the checksum of those before."""
    return data[:-64] + hashlib.sha256(data[:-64]).hexdigest().encode()


def archive(entries, compression=zipfile.ZIP_STORED):
    """Return a sealed zip of (name, contents)."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as made:
        for name, data in entries:
            made.writestr(zipfile.ZipInfo(name), data, compression)
        made.comment = bytes(64)
    return sealed(file.getvalue())


def checkpoint(state, tensors, **head):
    """Return a whole checkpoint of raw members, whose manifest has some entries changed."""
    digests = {
        name: hashlib.sha256(data).hexdigest()
        for name, data in zip(MEMBERS[1:], (state, tensors), strict=True)
    }
    manifest = {"format": "torch-trustregion checkpoint", "version": 3, "sha256": digests} | head
    return archive(zip(MEMBERS, (json.dumps(manifest).encode(), state, tensors), strict=True))
