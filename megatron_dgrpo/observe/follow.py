"""Files that grow, line by line."""

from __future__ import annotations

import os
from pathlib import Path


class Follower:
    """The lines that others add to a file from now on. The file may come later."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = path.stat().st_size if path.exists() else 0
        self._rest = b""

    def lines(self, last: bool = False) -> list[str]:
        """What was finished since the last call; with `last` what is unfinished, too."""
        try:
            with self._path.open("rb") as file:
                if os.fstat(file.fileno()).st_size <= self._place and not last:
                    return []
                file.seek(self._place)
                content = file.read()
        except FileNotFoundError:
            return []
        self._place += len(content)
        *lines, self._rest = (self._rest + content).split(b"\n")
        if last and self._rest:
            lines.append(self._rest)
            self._rest = b""
        return [line.decode(errors="replace") for line in lines]
