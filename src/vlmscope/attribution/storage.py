"""Where the edges of a graph lie while it is made and used: in memory, or in files that have no name.

A file without a name takes room on the disk and goes with its last array, however the program ends. Its room is
reserved when it is made, so that a full disk is an error then and not a crash in the middle.
"""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from vlmscope.core.errors import UserError


class Memory:
    """Arrays in memory."""

    on_disk = False

    def zeros(self, count: int, dtype: DTypeLike) -> np.ndarray:
        """`[count]`."""
        return np.zeros(count, dtype)


class Disk(Memory):
    """Arrays that are files in a folder, mapped into memory: the system reads and drops their pages as needed."""

    on_disk = True

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = Path(tempfile.gettempdir()) if folder is None else folder

    def zeros(self, count: int, dtype: DTypeLike) -> np.ndarray:
        """`[count]`.

        Raises:
            UserError: the folder cannot be written or has no room.
        """
        if count == 0:
            return np.zeros(0, dtype)
        size = count * np.dtype(dtype).itemsize
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                # The mapping outlives the file's handle.
                return np.asarray(np.memmap(file, dtype=dtype, mode="r+" if file.seek(0, 2) else "w+", shape=(count,)))
        except OSError as error:
            raise UserError(
                f"cannot put {size / 1e9:.2g} GB of edges into {self.folder}: {error.strerror}; choose another "
                "hydra.run.dir, fewer attribution.max_nodes, or more attribution.memory_gb"
            ) from error

    def free_bytes(self) -> int:
        """Room on the folder's disk."""
        return shutil.disk_usage(self.folder).free


MEMORY = Memory()
