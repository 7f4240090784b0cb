"""A node's journal: one JSON object a line for each thing worth knowing later. `psyche-sim` and dashboards read it."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class Journal:
    """Append-only ``journal.jsonl``; each line has ``kind`` and ``time`` (seconds since the epoch)."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = _ends_in_the_middle(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        if torn:
            self._file.write("\n")

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
        """Return the whole lines written since the last call; what a killed process left of one is passed over."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                chunk = file.read()
        except FileNotFoundError:
            return []
        end = chunk.rfind(b"\n") + 1
        self._offset += end
        return [line for text in chunk[:end].split(b"\n") if text and (line := self._parse(text)) is not None]

    def _parse(self, text: bytes) -> dict[str, Any] | None:
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("kind"), str):
            return line
        log.warning("%s: not a journal's line, passed over: %r", self._path, text[:80])
        return None


def _ends_in_the_middle(path: Path) -> bool:
    """Whether the last line lacks its end: an earlier process was killed while it wrote."""
    try:
        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return False
            file.seek(-1, os.SEEK_END)
            return file.read() != b"\n"
    except FileNotFoundError:
        return False
