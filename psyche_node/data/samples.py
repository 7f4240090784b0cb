"""What a data file holds: conversations, plain text, or tokens, told by the keys of each record."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from psyche_node.data.errors import BadSample, DataError
from psyche_node.data.formats import Sample, kind_of, parse_record
from psyche_node.data.readers import read_records
from psyche_node.data.skipping import Bad, refuse
from psyche_node.data.tokenized import Tokens, documents_of, is_tokenized


class SampleFormat(StrEnum):
    """How a record is read."""

    AUTO = "auto"
    MESSAGES = "messages"
    SHAREGPT = "sharegpt"
    COMPLETION = "completion"
    TEXT = "text"
    TOKENS = "tokens"


_KEYS = {
    SampleFormat.MESSAGES: ("messages",),
    SampleFormat.SHAREGPT: ("conversations",),
    SampleFormat.COMPLETION: ("prompt", "completion"),
    SampleFormat.TEXT: ("text",),
}


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, every token of which is trained but the first."""

    text: str
    key: bytes
    where: str


AnySample = Sample | Text | Tokens


def read_any(path: Path, form: SampleFormat = SampleFormat.AUTO, bad: Bad = refuse) -> Iterator[AnySample]:
    """Yield the samples of one file, in order.

    Raises:
        BadSample: a record is not a sample, and ``bad`` does not pass over it; says which, what is wrong and what to
            do.
        DataError: the file cannot be read, or holds no sample.
    """
    empty, passed = True, list[BadSample]()

    def passes(error: BadSample) -> None:
        bad(error)
        passed.append(error)
        del passed[1:]

    for where, record in read_records(path, passes):
        try:
            samples = list(parse_any(record, where, form))
        except BadSample as error:
            passes(error)
            continue
        empty = False
        yield from samples
    if empty:
        found = (
            f"good sample in it; the first record is bad: {passed[0]}"
            if passed
            else ("sample in it. Write one JSON object per line, or a row per sample")
        )
        raise DataError(f"{path}: there is no {found}")


def read_samples(path: Path) -> Iterator[Sample]:
    """Yield the conversations of one file, in order. Raises as `read_any`, and BadSample for anything else."""
    for sample in read_any(path):
        if not isinstance(sample, Sample):
            raise BadSample(sample.where, "this is not a conversation", "Pass a file of conversations")
        yield sample


def parse_any(record: dict[str, Any], where: str, form: SampleFormat = SampleFormat.AUTO) -> Iterator[AnySample]:
    """Yield the samples of one record: one, or the documents of a packed row. Raises BadSample.

    Without a format, the first of these that the record has the keys of: messages, ShareGPT, prompt and completion,
    tokens, text.
    """
    if form is SampleFormat.TOKENS or (form is SampleFormat.AUTO and not _has_chat(record) and is_tokenized(record)):
        if not is_tokenized(record):
            raise BadSample(where, "there is no list of tokens", "Name it `input_ids` or `inputs`")
        yield from documents_of(record, where)
        return
    if form is not SampleFormat.AUTO:
        record = _only(record, form, where)
    if form is SampleFormat.TEXT or (not _has_chat(record) and "text" in record):
        yield _text(record, where)
    else:
        yield parse_record(record, where)


def _has_chat(record: dict[str, Any]) -> bool:
    return any(all(key in record for key in _KEYS[form]) for form in _KEYS if form is not SampleFormat.TEXT)


def _only(record: dict[str, Any], form: SampleFormat, where: str) -> dict[str, Any]:
    """The record without the keys of other formats."""
    if missing := [key for key in _KEYS[form] if key not in record]:
        found = ", ".join(sorted(map(str, record))[:8]) or "nothing"
        raise BadSample(
            where, f"there is no `{missing[0]}`; the keys are {found}", f"Add it: the format {form.value} needs it"
        )
    others = {key for other, keys in _KEYS.items() if other is not form for key in keys}
    return {key: value for key, value in record.items() if key not in others}


def _text(record: dict[str, Any], where: str) -> Text:
    text = record["text"]
    if not isinstance(text, str) or not text:
        what = "empty" if text == "" else kind_of(text)
        raise BadSample(where, f"`text` is {what}", "Make it a string with at least one character")
    try:
        raw = text.encode()
    except UnicodeEncodeError as error:
        raise BadSample(where, "`text` has half of a surrogate pair", "Write the text as UTF-8") from error
    group = record.get("group")
    return Text(text, group.encode() if isinstance(group, str) else hashlib.sha256(raw).digest(), where)
