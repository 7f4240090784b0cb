"""Reading, writing and hashing files."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from psyche_node.data.errors import DataError


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Write ``parts`` so that ``path`` holds all of them or does not change, whatever happens meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            for part in parts:
                file.write(part)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def is_url(source: str) -> bool:
    """Whether ``source`` is fetched over HTTP(S), and not a path."""
    return source.startswith(("http://", "https://"))


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """Return the JSON object in a file. Raises DataError, which ends with the remedy."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}). {remedy}") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} is not a JSON object. {remedy}")
    return values
