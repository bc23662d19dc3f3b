"""One process per output folder."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from memento_sgl.errors import StoreError


class FolderLock:
    """An advisory lock that the kernel drops when the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        """Raises StoreError when another process works in the folder."""
        self._file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            self._file.close()
            raise StoreError(
                f"{folder} is in use by {owner}: wait for it, stop it, or choose another --out"
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def release(self) -> None:
        self._file.close()
