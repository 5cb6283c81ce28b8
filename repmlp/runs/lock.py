"""Two processes never do the same run: a lock in its folder, and who holds it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[str | None]:
    """Hold the lock of a run; yields None, or who holds it already ("host X, process Y").

    The operating system lets go of the lock when its holder dies, so a killed run leaves no stale lock behind; what
    its holder had written (owner.json) is then taken over.
    """
    folder.mkdir(parents=True, exist_ok=True)
    owner_file = folder / "owner.json"
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = "another process"
        with contextlib.suppress(OSError, ValueError, KeyError):  # its holder is just writing or removing it
            owner = json.loads(owner_file.read_text())
            holder = f"host {owner['host']}, process {owner['pid']}"
        yield holder
        return
    try:
        if owner_file.exists():
            log.info("taking over from a run that did not end: %s", " ".join(owner_file.read_text().split()))
        owner_file.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        yield None
        owner_file.unlink(missing_ok=True)
    except Exception:
        owner_file.unlink(missing_ok=True)
        raise
    finally:
        lock.release()
