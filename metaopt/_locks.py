"""Locks of the operating system, which are freed when the process that holds them ends."""

import contextlib
import os
from collections.abc import Iterator
from typing import IO


class Locked(Exception):
    """Another holder has the lock.

    Attributes:
      process: the id of the process that holds the lock; None if the lock file does not name it.
    """

    def __init__(self, process: int | None):
        super().__init__(f"Process {process} holds the lock.")
        self.process = process


@contextlib.contextmanager
def exclusive(path: str) -> Iterator[None]:
    """Holds a lock while the body runs.

    The lock is on a small file, which is made at the start and removed at the end. The operating system frees the lock
    when the process ends, even if it is killed. Child processes that are forked meanwhile hold the lock, too. On
    Windows, and on file systems without locks, the file is made but nothing is locked.

    Args:
      path: the path of the lock file, in a folder that exists.

    Raises:
      Locked: if another process, or another call in this process, holds the lock.
      OSError: if the file cannot be made.
    """
    while True:
        with open(path, "a+") as file:
            if not _lock(file):
                file.seek(0)
                process = file.read().strip()
                raise Locked(int(process) if process.isdecimal() else None)
            if os.name == "posix" and os.fstat(file.fileno()).st_nlink == 0:
                continue  # the former holder removed the file between `open` and the lock
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            return


def _lock(file: IO) -> bool:
    """Locks an open file. Returns whether no other holder has the lock."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system has no locks
        return True
    return True
