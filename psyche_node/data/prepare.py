"""From data files and a tokenizer folder to content-addressed, memory-mapped shards of packed sequences.

Documents wait on disk until all are there, because packing looks at all of them: memory holds 5 bytes per document
while they are read, and some 60 while they are packed, whatever their lengths.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from psyche_node.data.encode import Encoder
from psyche_node.data.errors import DataError
from psyche_node.data.files import sha256_file, write_atomically
from psyche_node.data.formats import SWITCH, Sample
from psyche_node.data.manifest import MAX_LENGTH, NAME, SHARD_NAME, Counts, Form, Manifest, Source, unigram_entropy
from psyche_node.data.rendering import own_source
from psyche_node.data.samples import SampleFormat, read_any
from psyche_node.data.shards import Written, write_shards
from psyche_node.data.skipping import Skips
from psyche_node.data.spill import LARGEST_TOKEN, Spill
from psyche_node.data.template import ChatTemplate
from psyche_node.folder_files import CONFIG, TEMPLATE
from psyche_node.units import counted

TooLong = Literal["drop", "cut"]


@dataclass(slots=True)
class Progress:
    """How far a preparation is: the file that is read (None: it packs and writes), samples, and tokens for
    training, so far."""

    file: Path | None = None
    samples: int = 0
    tokens: int = 0


@dataclass(slots=True)
class _Settings:
    length: int
    heldout: float
    seed: int
    too_long: TooLong
    form: SampleFormat
    length_control: int


@dataclass(slots=True)
class _Nearest:
    """The training samples that would be held out first: one with its duplicates, or with its group.

    ``documents`` are (number in the spill, number of the source).
    """

    ticket: int = 1 << 64
    documents: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True)
class _Read:
    """What reading has found so far: by file its hash and counts."""

    sources: list[tuple[str, dict[str, int]]] = field(default_factory=list)
    nearest: _Nearest = field(default_factory=_Nearest)
    switched: int = 0
    """Samples that set the switch for reasoning."""


def prepare(
    sources: Path | Sequence[Path],
    tokenizer: Path,
    out: Path,
    sequence_length: int,
    heldout: float = 0.05,
    seed: int = 0,
    too_long: TooLong = "drop",
    form: SampleFormat = SampleFormat.AUTO,
    template: str | None = None,
    length_control: int = 0,
    progress: Callable[[Progress], None] = lambda so_far: None,
    skips: Skips | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Write the folder ``out`` from one data file or several, and return its manifest, which is written last.

    The same inputs give the same bytes on every host. ``heldout`` is the fraction of samples kept for evaluation,
    chosen by a hash of each sample keyed with ``seed``, so that adding samples moves no other one across. ``too_long``
    says what happens to a sample of more than ``sequence_length`` tokens; the manifest counts it either way.
    ``template`` and ``length_control`` are those of `Encoder`. ``skips`` bounds how many bad samples are passed over,
    by default none; the manifest counts them, and does not say what the bound was. ``warn`` hears of what samples ask
    for, and the template cannot do.

    Raises:
        BadSample: a record is not a sample, or the chat template refuses it, and ``skips`` does not allow it.
        DataError: a file cannot be read, a setting makes no sense, or nothing is left to train on; or ``out`` has a
            chat template that would be lost.
    """
    if sequence_length < 2:
        raise DataError(f"a sequence length of {sequence_length} leaves nothing to predict. Use at least 2")
    if sequence_length > MAX_LENGTH:
        raise DataError(f"a sequence length of {sequence_length:,} is too long. Use at most {MAX_LENGTH:,}")
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file. Name a new folder for the data")
    if not 0 <= heldout < 1:
        raise DataError(f"a held-out fraction of {heldout} is not in [0, 1). The default is 0.05")
    files = [sources] if isinstance(sources, Path) else list(sources)
    if not files:
        raise DataError("there is no file to prepare. Name at least one")
    settings = _Settings(sequence_length, heldout, seed, too_long, form, length_control)
    encoder = Encoder(tokenizer, template, length_control)
    if encoder.vocabulary > LARGEST_TOKEN:
        raise DataError(f"{tokenizer} has tokens beyond {LARGEST_TOKEN}. Use another tokenizer")
    _spare_template(out, encoder.template.source)
    with Spill(out) as spill:
        read = _Read()
        for number, path in enumerate(files):
            _read_file(number, path, encoder, settings, spill, read, progress, skips or Skips())
        _always_hold_some_out(settings, spill, read)
        counts = Counts.total(Counts(**part) for _, part in read.sources)
        if not counts.train:
            names = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
            reasons = (
                (counts.heldout, "held out"),
                (counts.too_long, f"with more than {sequence_length:,} tokens"),
                (counts.untrained, "without a token that is trained"),
                (counts.bad, "bad"),
            )
            why = ", ".join(f"{count:,} {reason}" for count, reason in reasons if count)
            longer = "Use a longer `--sequence-length`, or cut with `psyche-node data prepare --too-long cut`"
            remedy = longer if counts.too_long else "Add some that can"
            raise DataError(f"{names}: no sample can be trained on: of {counts.samples:,}, {why}. {remedy}")
        if read.switched and not encoder.template.thinks:
            warn(_no_switch(read.switched, encoder.template))
        progress(Progress(None, counts.samples, spill.tokens))
        return _write(out, spill, encoder, settings, read)


def _no_switch(samples: int, template: ChatTemplate) -> str:
    others = " or ".join(f"`--template {name}`" for name in template.switchable())
    return (
        f"{counted(samples, 'sample')} set{'s' * (samples == 1)} `{SWITCH}`, and {template.where} has no such switch: "
        f"that does nothing. {f'With {others} it does' if others else 'Choose a template that has one'}"
    )


def _spare_template(out: Path, source: str) -> None:
    """A model's folder keeps its template: that of the data is written beside the manifest, and would replace it."""
    if (out / NAME).is_file() and not (out / CONFIG).is_file():
        return  # that of the data which is replaced
    if own_source(out) not in (None, source):
        raise DataError(
            f"{out} has a chat template of its own, and that of the data, which is another one, would replace it. Name "
            "a new folder for the data"
        )


def tokenizer_digest(folder: Path, source: str) -> str:
    """SHA-256 (hex) over the tokenizer.json of a folder and the text of a chat template."""
    state = hashlib.sha256((folder / "tokenizer.json").read_bytes())
    state.update(b"\0" + source.encode())
    return state.hexdigest()


def _read_file(
    number: int,
    path: Path,
    encoder: Encoder,
    settings: _Settings,
    spill: Spill,
    read: _Read,
    progress: Callable[[Progress], None],
    skips: Skips,
) -> None:
    passed = skips.count
    counts = dict.fromkeys(Counts.model_fields, 0)
    so_far = Progress(path, sum(part["samples"] for _, part in read.sources), spill.tokens)
    held_below = int(settings.heldout * 2**64)
    for sample, (ids, trained) in encoder.documents(read_any(path, settings.form, skips), skips):
        counts["samples"] += 1
        so_far.samples, so_far.tokens = so_far.samples + 1, spill.tokens
        progress(so_far)
        if len(ids) > settings.length:
            if settings.too_long == "drop":
                counts["too_long"] += 1
                continue
            ids, trained = ids[: settings.length], trained[: settings.length]
            counts["cut"] += int(bool(trained.any()))
        if not trained.any():
            counts["untrained"] += 1
            continue
        read.switched += int(isinstance(sample, Sample) and SWITCH in sample.options)
        counts["closed"] += int(isinstance(sample, Sample) and sample.closed)
        ticket = _ticket(sample.key, settings.seed)
        held = ticket < held_below
        if not held and ticket < read.nearest.ticket:
            read.nearest = _Nearest(ticket)
        if not held and ticket == read.nearest.ticket:
            read.nearest.documents.append((len(spill), number))
        counts["heldout" if held else "train"] += 1
        spill.append((ids, trained), heldout=held)
    counts["bad"] = skips.count - passed
    counts["samples"] += counts["bad"]
    read.sources.append((sha256_file(path), counts))


def _always_hold_some_out(settings: _Settings, spill: Spill, read: _Read) -> None:
    """A small set still has something to be judged by, and none of it is trained on, too."""
    nearest = read.nearest.documents
    if not settings.heldout or len(spill.numbers(heldout=True)) or len(nearest) == len(spill):
        return
    for document, source in nearest:
        spill.hold_out(document)
        counts = read.sources[source][1]
        counts["train"] -= 1
        counts["heldout"] += 1


def _ticket(key: bytes, seed: int) -> int:
    digest = hashlib.blake2b(key, digest_size=8, key=b"psyche held out %d" % seed).digest()
    return int.from_bytes(digest, "little")


def _write(out: Path, spill: Spill, encoder: Encoder, settings: _Settings, read: _Read) -> Manifest:
    form = Form(settings.length, 2 if encoder.vocabulary <= 1 << 16 else 4, encoder.pad)
    documents = spill.reader()
    train, held = (
        write_shards(out, documents, spill.numbers(heldout=side), form, encoder.vocabulary) for side in (False, True)
    )
    manifest = Manifest(
        sources=tuple(Source(sha256=digest, counts=Counts(**part)) for digest, part in read.sources),
        tokenizer=tokenizer_digest(encoder.template.folder, encoder.template.source),
        vocabulary=encoder.vocabulary,
        pad=form.pad,
        sequence_length=form.length,
        token_bytes=form.width,
        seed=settings.seed,
        heldout_fraction=settings.heldout,
        too_long=settings.too_long,
        length_control=settings.length_control,
        train=train.shards,
        heldout=held.shards,
        tokens=train.tokens,
        trained_tokens=int(train.frequency.sum()),
        heldout_trained_tokens=int(held.frequency.sum()),
        efficiency=_efficiency(train, settings.length),
        unigram_entropy=unigram_entropy(dict(enumerate(train.frequency.tolist()))),
    )
    # For people, and to tell a model's template from it: what the manifest has of it is the digest.
    write_atomically(out / TEMPLATE, encoder.template.source.encode())
    write_atomically(out / NAME, manifest.to_bytes())
    _remove_others(out, manifest)
    return manifest


def _remove_others(out: Path, manifest: Manifest) -> None:
    """What was prepared into this folder before is no longer named by any manifest."""
    named = {shard.file for shard in (*manifest.train, *manifest.heldout)}
    for path in out.glob("*.bin"):
        if path.name not in named and SHARD_NAME.fullmatch(path.name):
            path.unlink()


def _efficiency(written: Written, length: int) -> float:
    return round(written.tokens / (sum(shard.sequences for shard in written.shards) * length), 6)
