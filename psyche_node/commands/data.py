"""`psyche-node data`: from files of samples to the prepared folder that nodes train on."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from psyche_node import log as logs
from psyche_node.commands.ending import failures
from psyche_node.units import count_text, counted, tokens_text

if TYPE_CHECKING:
    from psyche_node.data.manifest import Manifest
    from psyche_node.data.prepare import Progress
    from psyche_node.data.preview import Preview
    from psyche_node.data.skipping import Skips

app = typer.Typer(no_args_is_help=True, help="Prepare, look at and check training data.")
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
_REPORT_EVERY = 0.2
_REPORT_EVERY_IN_A_LOG = 10.0
_LISTED = 20


@app.command()
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(help="Data files, folders, http(s) URLs (#sha256=HEX pins one), hf://datasets/OWNER/NAME."),
    ],
    tokenizer: Annotated[Path, typer.Option(help="Hugging Face folder with the tokenizer and its chat template.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="Prepare anew into a folder that holds prepared data already.")
    ] = False,
    sequence_length: Annotated[int, typer.Option(help="Tokens per packed sequence.")] = 16_384,
    heldout: Annotated[float, typer.Option(help="Fraction of the samples that is kept for evaluation.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Which samples those are.")] = 0,
    too_long: Annotated[
        Literal["drop", "cut"], typer.Option(help="What happens to samples that do not fit into one sequence.")
    ] = "drop",
    form: Annotated[
        Literal["auto", "messages", "sharegpt", "completion", "text", "tokens"],
        typer.Option("--format", help="How records are read; auto: by their keys."),
    ] = "auto",
    template: Annotated[
        str | None,
        typer.Option(help="Chat template: hermes-llama3, chatml, or a file; by default the tokenizer's own."),
    ] = None,
    length_control: Annotated[
        int,
        typer.Option(help="End reasoning after this many tokens, and train only its end there; 0: never."),
    ] = 0,
    skip_bad: Annotated[
        str,
        typer.Option(metavar="N|all", help="Pass over so many bad samples at most, counted by reason; then stop."),
    ] = "0",
    cache: Annotated[
        Path | None, typer.Option(help="Where downloads are kept. Default: in ~/.cache/psyche-node.")
    ] = None,
    max_gb: Annotated[float, typer.Option(min=0.0, help="Largest file to download, in GB.")] = 1000.0,
    as_json: Json = False,
) -> None:
    """Tokenize, pack and write a folder that nodes train on. The same inputs give the same bytes on every host."""
    from psyche_node.data.errors import DataError
    from psyche_node.data.locate import find_files
    from psyche_node.data.prepare import prepare as write
    from psyche_node.data.preview import is_prepared
    from psyche_node.data.samples import SampleFormat
    from psyche_node.data.skipping import Skips, read_limit
    from psyche_node.data.sources import cache_folder

    try:
        skips = Skips(read_limit(skip_bad))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    with _work():
        if is_prepared(out) and not replace:
            raise DataError(f"{out} holds prepared data already. Name another folder, or replace it with `--replace`")
        downloads = cache or cache_folder() / "downloads"
        files = [path for source in sources for path in find_files(source, downloads, int(max_gb * 1e9), note=_note)]
        with _progress() as progress:
            manifest = write(
                files,
                tokenizer,
                out,
                sequence_length,
                heldout,
                seed,
                too_long,
                SampleFormat(form),
                template,
                length_control,
                progress,
                skips,
            )
        if as_json:
            typer.echo(json.dumps(_values(out, files, manifest, skips)))
        else:
            _summary(out, files, manifest, skips)


@app.command()
def show(
    source: Annotated[str, typer.Argument(help="Prepared folder, or a file of samples.")],
    number: Annotated[int, typer.Argument(min=0, help="Which sequence, or sample, counted from 0.")] = 0,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Hugging Face folder of the tokenizer; without it, a prepared folder is shown in numbers."),
    ] = None,
    template: Annotated[str | None, typer.Option(help="Chat template, as in `prepare`; for a file.")] = None,
    length_control: Annotated[int, typer.Option(help="Budget for reasoning, as in `prepare`; for a file.")] = 0,
    form: Annotated[
        Literal["auto", "messages", "sharegpt", "completion", "text", "tokens"],
        typer.Option("--format", help="How records are read; auto: by their keys."),
    ] = "auto",
    heldout: Annotated[bool, typer.Option("--heldout", help="Of the sequences that are kept for evaluation.")] = False,
    as_json: Json = False,
) -> None:
    """Show which tokens are trained: of a packed sequence, or of a sample as it would be prepared."""
    from psyche_node.data.encode import Encoder
    from psyche_node.data.errors import DataError
    from psyche_node.data.locate import is_remote
    from psyche_node.data.preview import is_prepared, preview_sample, preview_sequence
    from psyche_node.data.samples import SampleFormat

    path = Path(source)
    with _work():
        if is_remote(source):
            raise DataError(f"{source}: only what is on this host is shown. Download a file of it, and name that")
        if is_prepared(path):
            preview = preview_sequence(path, number, tokenizer, heldout=heldout)
        elif tokenizer is None:
            raise DataError(f"{source} is no prepared folder. To show a file of samples, name a `--tokenizer`")
        else:
            encoder = Encoder(tokenizer, template, length_control)
            preview = preview_sample(path, number, encoder, SampleFormat(form))
        _show(preview, as_json)


@app.command()
def template(
    name: Annotated[str, typer.Argument(help="hermes-llama3 or chatml.")],
) -> None:
    """Print a chat template of this package, to be saved as a model folder's chat_template.jinja."""
    from psyche_node.data.rendering import find_template

    with _work():
        typer.echo(find_template(name).source, nl=False)


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="Prepared folder.")],
    against: Annotated[
        str | None,
        typer.Option(help="What it should be: the SHA-256 of a manifest, or a manifest, its folder or its URL."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Verify every file of a prepared folder, and compare it with the run's or another host's."""
    from psyche_node.data.compare import verify

    with _work():
        with _line() as say:
            manifest = verify(folder, against, lambda done, files: say(f"verified {done} of {files} files"))
        values = {"manifest": manifest.digest.hex(), "files": len(manifest.train) + len(manifest.heldout)}
        values |= _figures(manifest)
        if as_json:
            typer.echo(json.dumps({"folder": str(folder), "ok": True, **values}))
        else:
            typer.echo(f"{folder}: all {values['files']} files are what the manifest says")
            for line in (*_packed(manifest), f"manifest   {values['manifest']}"):
                typer.echo(line)


@contextmanager
def _work() -> Iterator[None]:
    """End the command with the message and exit code of a `DataError`."""
    from psyche_node.data.errors import DataError

    logs.configure("data")
    with failures(DataError):
        yield


def _note(line: str) -> None:
    typer.echo(line, err=True)


@contextmanager
def _line() -> Iterator[Callable[..., None]]:
    """Say what goes on: in one line on a terminal, that is written over; in a line now and then in a log."""
    live = sys.stderr.isatty()
    last = time.monotonic()

    def say(line: str, at_once: bool = False) -> None:
        nonlocal last
        now = time.monotonic()
        if at_once or now - last >= (_REPORT_EVERY if live else _REPORT_EVERY_IN_A_LOG):
            last = now
            typer.echo(f"\r\x1b[2K{line}" if live else line, err=True, nl=not live)

    try:
        yield say
    finally:
        if live:
            typer.echo("\r\x1b[2K", err=True, nl=False)


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    started = time.monotonic()

    def show(so_far: Progress) -> None:
        doing = "packing and writing" if so_far.file is None else f"reading {so_far.file.name}"
        rate = count_text(so_far.tokens / max(time.monotonic() - started, 1e-9))
        say(
            f"{doing}: {counted(so_far.samples, 'sample')}, {so_far.tokens:,} tokens for training, {rate} tokens/s",
            at_once=so_far.file is None,
        )

    with _line() as say:
        yield show


def _show(preview: Preview, as_json: bool) -> None:
    from rich.console import Console

    from psyche_node.commands.preview import preview_values, print_preview

    if as_json:
        typer.echo(json.dumps(preview_values(preview)))
    else:
        print_preview(preview, Console(highlight=False))


def _values(out: Path, files: list[Path], manifest: Manifest, skips: Skips) -> dict[str, Any]:
    return {
        "folder": str(out),
        "manifest": manifest.digest.hex(),
        "sources": [
            {"file": str(path), **source.model_dump()} for path, source in zip(files, manifest.sources, strict=True)
        ],
        "counts": manifest.counts.model_dump(),
        "bad": [asdict(reason) for reason in skips.reasons],
        **_figures(manifest),
    }


def _figures(manifest: Manifest) -> dict[str, Any]:
    return {
        "sequences": manifest.sequences,
        "heldout_sequences": manifest.heldout_sequences,
        "sequence_length": manifest.sequence_length,
        "tokens": manifest.tokens,
        "trained_tokens": manifest.trained_tokens,
        "heldout_trained_tokens": manifest.heldout_trained_tokens,
        "efficiency": manifest.efficiency,
    }


def _packed(manifest: Manifest) -> Iterator[str]:
    """What `prepare` and `check` say of the sequences of a folder."""
    yield f"training   {tokens_text(manifest.tokens, manifest.trained_tokens)}"
    yield (
        f"packed     {counted(manifest.sequences, 'sequence')} of {manifest.sequence_length:,} tokens, "
        f"{manifest.efficiency:.2%} full"
    )
    held = counted(manifest.heldout_sequences, "sequence")
    yield f"held out   {held} with {manifest.heldout_trained_tokens:,} tokens that a model is judged by"


def _summary(out: Path, files: list[Path], manifest: Manifest, skips: Skips) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("file", "samples", "training", "held out", "too long", "cut", "untrained", "bad", box=None)
    parts = list(zip(files, manifest.sources, strict=True))
    rows = [(path.name, source.counts) for path, source in parts[:_LISTED]]
    if len(parts) > _LISTED:
        rows.append((f"and {len(parts) - _LISTED} more", manifest.counts.total(s.counts for _, s in parts[_LISTED:])))
    if len(parts) > 1:
        rows.append(("all", manifest.counts))
    for name, counts in rows:
        numbers = (counts.train, counts.heldout, counts.too_long, counts.cut, counts.untrained, counts.bad)
        table.add_row(name, *(f"{number:,}" for number in (counts.samples, *numbers)))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    long = "cut to fit" if manifest.too_long == "cut" else "dropped"
    console.print(f"too long   more than {manifest.sequence_length:,} tokens: {long}; untrained: no token has a loss")
    for number, reason in enumerate(skips.reasons):
        console.print(f"{'' if number else 'bad':<10} {reason}", markup=False)
    for line in _packed(manifest):
        console.print(line)
    if manifest.length_control:
        console.print(
            f"closed     {manifest.counts.closed:,} samples: reasoning ended after {manifest.length_control:,} tokens"
        )
    console.print(f"manifest   {manifest.digest.hex()}  ({out})")
