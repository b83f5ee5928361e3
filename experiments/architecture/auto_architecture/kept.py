"""Finished parts of a run, in a file."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: one shape after the other
    fcntl = None

CAN_SHARE = fcntl is not None  # whether several processes can share the file


class Kept:
    """Finished parts by name, in a file next to the result, and the total seconds of the processes that made them.

    Several processes may write to the file.
    """

    def __init__(self, path: Path, settings: dict[str, Any], code: str, any_code: bool = False):
        self.path, self.any_code = path, any_code
        self.parts, self.data, self.code, self.before = {}, {}, {}, (0.0, 0.0)
        self.settings, self.now = json.loads(json.dumps(settings)), code
        self.begin = time.perf_counter(), time.process_time()
        self.read()

    def read(self) -> None:
        """Adds the content of the file."""
        if self.path.is_file():
            saved = json.loads(self.path.read_text())
            if saved["settings"] != self.settings:
                sys.exit(
                    f"{self.path} holds parts of a run with other settings: remove it, or give --out another folder."
                )
            for name in ("parts", "data", "code"):  # parts from before `code` was recorded have none
                setattr(self, name, saved.get(name, {}) | getattr(self, name))
            self.before = tuple(saved["seconds"])

    def seconds(self) -> tuple[float, float]:
        """Returns wall-clock and processor seconds of all processes."""
        clock, processor = time.perf_counter() - self.begin[0], time.process_time() - self.begin[1]
        return self.before[0] + clock, self.before[1] + processor

    def write(self) -> None:
        """Writes the file, including parts that other processes have written in the meantime."""
        with open(f"{self.path}.lock", "w") as lock:  # a lock of the operating system, which ends with the process
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX)
            self.read()
            self.before, self.begin = self.seconds(), (time.perf_counter(), time.process_time())
            state = {name: getattr(self, name) for name in ("settings", "parts", "data", "code")}
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps({**state, "seconds": self.before}))
            part.replace(self.path)  # atomic: a run that is killed here leaves the earlier file

    def num_other_code(self) -> int:
        """Returns the number of parts that other code made."""
        return sum(self.code.get(name) != self.now for name in self.parts)

    def get(self, name: str, data: int, make: Callable[[], Any]) -> Any:
        """Returns the part with this name, of data with this checksum. A missing part is made and written."""
        if name not in self.parts:
            self.parts[name], self.data[name], self.code[name] = make(), data, self.now
            self.write()
        if self.data[name] != data:
            sys.exit(f"{self.path} holds {name!r} of other data: remove it, or give --out another folder.")
        if self.code.get(name) != self.now and not self.any_code:
            sys.exit(
                f"{self.path} holds {name!r} by other code: remove it, give --out another folder, or --any-code to "
                "take it as it is."
            )
        return self.parts[name]
