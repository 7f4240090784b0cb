"""`psyche-node serve`: a model behind OpenAI's interface."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from psyche_node import log as logs
from psyche_node.commands.ending import failures
from psyche_node.commands.interrupts import Interrupts
from psyche_node.exits import Exit
from psyche_node.generation import GenerationError
from psyche_node.generation.folder import check_folder
from psyche_node.serving.errors import ServeError
from psyche_node.serving.place import bind, read_key

log = logging.getLogger(__name__)


def serve(
    folder: Annotated[Path, typer.Argument(help="Hugging Face model folder, such as runs/TIME/model.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port; 0 picks a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model. Default: the folder's name.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer a request can get, in tokens.")] = 32_768,
    waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are refused (429).")] = 32,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File of mode 0600 with a key that clients must send.")
    ] = None,
    grace: Annotated[
        float,
        typer.Option(min=0, max=3600, help="Seconds for answers under way when it is stopped; then they are cut."),
    ] = 10.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Serve a model at http://HOST:PORT/v1 for clients of OpenAI's interface. SIGTERM or Ctrl-C ends it: answers under
    way are finished first, for as long as --grace says, and cut off by a second one."""
    logs.configure("serve")
    interrupts = Interrupts()
    with failures(GenerationError, ServeError), interrupts.heard():
        check_folder(folder)
        key = None if api_key_file is None else read_key(api_key_file)
        with bind(host, port) as taken:
            # Imported late: neither `--help` nor what is refused waits for torch.
            from psyche_node.generation import Engine
            from psyche_node.serving.server import Terms
            from psyche_node.serving.server import serve as run

            engine = Engine.load(folder, device, dtype)
            for reason in engine.reasons:
                log.info("%s", reason)
            terms = Terms(name or folder.resolve().name, max_tokens, waiting, key, grace)
            run(engine, taken, terms, interrupts.call)
    raise typer.Exit(Exit.INTERRUPTED)
