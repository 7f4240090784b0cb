"""``python -m psyche_node.relay``: connections through a line of a given rate, delay and loss."""

from __future__ import annotations

import ipaddress
import json
import signal
from typing import Annotated

import typer

from coordinator.ledger.descriptors import raise_file_limit
from psyche_node import log
from psyche_node.exits import Exit
from psyche_node.relay.forward import Address, Forward, Loop, open_link
from psyche_node.relay.spec import FORM, BadSpec, LinkSpec

# The form of a line has brackets, which are no markup.
app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def relay(
    to: Annotated[
        list[str],
        typer.Option(
            help="IP:PORT to forward to; several, with commas between, share one line. Repeat for more lines."
        ),
    ],
    link: Annotated[str, typer.Option(help=f"The line: {FORM}.")] = "unlimited/0",
    listen: Annotated[str, typer.Option(help="IP address to listen on.")] = "127.0.0.1",
    seed: Annotated[int, typer.Option(help="Seed of jitter and losses.")] = 0,
) -> None:
    """Forward TCP connections as if over a line. Prints one line of JSON, for each target the address that leads there,
    and runs until SIGTERM or Ctrl-C."""
    log.configure("relay")
    # A connection takes two descriptors.
    raise_file_limit()
    loop = Loop()
    try:
        spec = LinkSpec.parse(link)
        lines = [[_address(target) for target in targets.split(",")] for targets in to]
        forwards: list[Forward] = []
        for number, targets in enumerate(lines):
            forwards += open_link(loop, spec, targets, listen, seed=seed + number)
    except BadSpec as error:
        raise _refusal(str(error)) from None
    except OSError as error:
        raise _refusal(f"cannot listen on {listen}: {error.strerror}. Is it an address of this machine?") from None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: setattr(loop, "stopping", True))
    typer.echo(json.dumps([{"to": _text(forward.target), "at": _text(forward.address)} for forward in forwards]))
    loop.run()
    loop.close()


def _refusal(reason: str) -> typer.Exit:
    typer.secho(f"relay: {reason}", fg="red", err=True)
    return typer.Exit(Exit.USAGE)


def _address(text: str) -> Address:
    host, _, port = text.strip().rpartition(":")
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        usable = 0 < int(port) < 65536
    except ValueError:
        usable = False
    if not usable:
        raise BadSpec(f"{text!r} is not IP:PORT")
    return str(address), int(port)


def _text(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


if __name__ == "__main__":
    app()
