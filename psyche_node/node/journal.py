"""A node's journal: one JSON object a line for each thing worth knowing later. `psyche-sim` and dashboards read it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


class Journal:
    """Append-only ``journal.jsonl``; each line has ``kind`` and ``time`` (seconds since the epoch)."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, kind: str, **fields: Any) -> None:
        self._file.write(json.dumps({"kind": kind, "time": round(time.time(), 4), **fields}) + "\n")

    def close(self) -> None:
        self._file.close()


class JournalReader:
    """Follow a journal that another process writes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """Return the whole lines written since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                chunk = file.read()
        except FileNotFoundError:
            return []
        end = chunk.rfind(b"\n") + 1
        self._offset += end
        return [json.loads(line) for line in chunk[:end].splitlines()]
