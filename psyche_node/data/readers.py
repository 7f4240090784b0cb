"""Records of data files, one at a time: JSON lines (also compressed), parquet, arrow and plain text.

Memory is one line, or one batch of rows, whatever the size of the file. Every record comes with its place,
``file:number``: of the line in a text file, of the row in a table (from 1).
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from psyche_node.data.errors import BadSample, DataError
from psyche_node.data.skipping import Bad, refuse

MAX_LINE = 64 * 1024 * 1024
"""Longest line, in bytes; a longer one is not a sample, and would be read into memory whole."""
_ROWS = 256
_COMPRESSED = (".gz", ".zst", ".bz2")
_LINES = (".jsonl", ".ndjson", ".json")
_TABLES = (".parquet", ".arrow", ".feather")
SUFFIXES = (*_LINES, *(line + end for line in _LINES for end in _COMPRESSED), *_TABLES, ".txt")
"""Endings of the files that can be read."""

Record = dict[str, Any]


def suffix_of(name: str) -> str | None:
    """The ending of a file's name that says how to read it; None if nothing here can."""
    return next((suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if name.lower().endswith(suffix)), None)


def read_records(path: Path, bad: Bad = refuse) -> Iterator[tuple[str, Record]]:
    """Yield (place, record) of a file in order. Token columns of tables are numpy arrays.

    Raises:
        BadSample: a line is not a JSON object, and ``bad`` does not pass over it.
        DataError: the file cannot be read, or nothing here reads its kind.
    """
    suffix = suffix_of(path.name)
    if path.is_dir():
        raise DataError(f"{path} is a folder. Name one of the files in it")
    if suffix is None and not path.exists():
        raise DataError(f"{path}: there is no such file or folder. Name a data file, or a prepared folder")
    if suffix is None:
        raise DataError(f"{path}: no known kind of file. Known are {', '.join(SUFFIXES)}")
    try:
        if suffix == ".txt":
            yield f"{path}:1", {"text": path.read_text(encoding="utf-8-sig")}
        elif suffix in _TABLES:
            yield from _table(path, suffix)
        else:
            with _opened(path) as file:
                yield from _lines(path, file, bad)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}). Convert it, with iconv for example") from error
    except EOFError as error:
        raise DataError(f"{path} ends in the middle ({error}). Fetch it again") from error
    except OSError as error:  # what pyarrow raises for damaged files, too
        raise DataError(f"{path}: {error.strerror or error}. Pass a data file that can be read") from error


def _opened(path: Path) -> IO[bytes]:
    end = path.suffix.lower()
    if end == ".gz":
        return io.BufferedReader(gzip.open(path))
    if end not in _COMPRESSED:
        return path.open("rb")
    import pyarrow as pa  # late: who reads JSON lines does not wait for it

    return io.BufferedReader(pa.input_stream(str(path), compression="zstd" if end == ".zst" else "bz2"))


def _lines(path: Path, file: IO[bytes], bad: Bad) -> Iterator[tuple[str, Record]]:
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        where = f"{path}:{number}"
        try:
            record = decode(line, where) if line.strip() else None
        except BadSample as error:
            bad(error)
            while len(line) > MAX_LINE and not line.endswith(b"\n"):  # the rest of a line that is too long
                line = file.readline(MAX_LINE + 1)
            continue
        if record is not None:
            yield where, record


def decode(line: bytes, where: str) -> Record:
    """Return the object of one JSON line. Raises BadSample."""
    if len(line) > MAX_LINE:
        raise BadSample(where, f"the line has more than {MAX_LINE} bytes", "Split it into several samples")
    try:
        text = line.decode("utf-8-sig")  # of bytes, the parser would guess the encoding
        record = json.loads(text.rstrip())  # a line that ends too early is wrong at its end, not in a second line
    except (ValueError, RecursionError) as error:
        raise BadSample(where, f"this is not JSON{_place(error)}", _remedy(line)) from error
    if not isinstance(record, dict):
        what = "an array" if isinstance(record, list) else f"{json.dumps(record, ensure_ascii=False):.40}"
        raise BadSample(where, f"this is {what}, not an object", _remedy(line))
    return record


def _remedy(line: bytes) -> str:
    """What makes lines of what people have instead."""
    if b"\0" in line:
        return "Write one JSON object per line, in UTF-8: `iconv -f UTF-16 -t UTF-8 FILE` makes UTF-8 of UTF-16"
    ways = {b"[": "`jq -c '.[]' FILE` makes lines of one array", b"{": "`jq -c . FILE` makes lines of indented objects"}
    start = line.strip()
    way = ways.get(start[:1]) if start[:1] == b"[" or start == b"{" else None
    return "Write one JSON object per line, in UTF-8" + (f": {way}" if way else "")


def _place(error: Exception) -> str:
    """Where in its line the parser stopped, and why. The file's own line is the only one that is named."""
    if isinstance(error, json.JSONDecodeError):
        return f" from column {error.colno} on ({error.msg})"
    if isinstance(error, UnicodeDecodeError):
        return f" from byte {error.start + 1} on (it is not {error.encoding.upper()}: {error.reason})"
    return f" ({error})"


def _table(path: Path, suffix: str) -> Iterator[tuple[str, Record]]:
    import pyarrow as pa

    number = 0
    for batch in _parquet(path) if suffix == ".parquet" else _arrow(path):
        for start in range(0, batch.num_rows, _ROWS):
            part = batch.slice(start, _ROWS)
            columns = []
            for name, column in zip(part.schema.names, part.columns, strict=True):
                if _holds_numbers(pa, column.type):
                    columns.append((name, [None if not row.is_valid else row.values.to_numpy(False) for row in column]))
                else:
                    columns.append((name, [_without_nulls(value) for value in column.to_pylist()]))
            for row in range(part.num_rows):
                number += 1
                yield f"{path}:{number}", {n: values[row] for n, values in columns if values[row] is not None}


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            yield from file.iter_batches(batch_size=_ROWS)
    except pa.ArrowException as error:
        raise DataError(f"{path} is not a parquet file that can be read ({error}). Write or fetch it again") from error


def _arrow(path: Path) -> Iterator[Any]:
    """Batches of an arrow file or, as the `datasets` library saves them, stream."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file:
            if file.read(6) == b"ARROW1":
                table = pa.ipc.open_file(file)
                yield from (table.get_batch(number) for number in range(table.num_record_batches))
            else:
                file.seek(0)
                yield from pa.ipc.open_stream(file)
    except pa.ArrowException as error:
        raise DataError(f"{path} is not an arrow file that can be read ({error}). Write or fetch it again") from error


def _holds_numbers(pa: Any, kind: Any) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(lists and (pa.types.is_integer(kind.value_type) or pa.types.is_boolean(kind.value_type)))


def _without_nulls(value: Any) -> Any:
    """Tables have every key in every row: what a record did not have is null there."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value
