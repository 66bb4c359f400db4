"""A warning for other PyPI distributions with the import names of this one."""

from __future__ import annotations

import warnings
from importlib import metadata


def warn_of_clashes() -> None:
    """Warn if the unrelated PyPI distributions ``trustregion`` or ``rl`` are installed.

    Distributions with the same import name overwrite each other's files in site-packages.
    """
    for name in ("trustregion", "rl"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        warnings.warn(
            f"the PyPI distribution {name!r} {version} is installed beside torch-trustregion and"
            f" has the same import name: `import {name}` may load files of either. Repair it with"
            f" `pip uninstall {name}` and then"
            " `pip install --force-reinstall --no-deps torch-trustregion`",
            UserWarning,
            stacklevel=3,
        )
