"""Whether Triton's cache of compiled kernels is the user's own: what lies there is run as code."""

from __future__ import annotations

import os
import stat
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def exposed_cache() -> str | None:
    """Say why Triton's cache cannot be trusted, or None if it can; looked at once a process."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~/")
    default = os.path.join(home, ".triton", "cache")
    return why_exposed(Path(os.environ.get("TRITON_CACHE_DIR") or default))


def why_exposed(folder: Path) -> str | None:
    """Say why others can write to a folder, or None if they cannot.

    A folder that is not there is made, for its owner alone, so that nobody else makes it first.

    Args:
        folder (Path): the folder.

    Returns:
        str or None: the reason.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(why_exposed(Path(folder) / "cache"))
        None
    """
    if not hasattr(os, "getuid"):
        return None  # folders of users are private on Windows
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        return f"Triton's cache {folder} cannot be used: {error}"
    if found.st_uid not in (os.getuid(), 0):
        return f"Triton's cache {folder} belongs to another user; set TRITON_CACHE_DIR"
    # A group of the user's own, as many systems give, has nobody else in it.
    shared = stat.S_IWGRP if found.st_gid != os.getgid() else 0
    if found.st_mode & (stat.S_IWOTH | shared):
        return f"Triton's cache {folder} can be written by others; chmod 700 it"
    return None
