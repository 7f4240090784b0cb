"""Commands whose options are partly their own and partly those that all commands of a kind have."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final

import typer
from typer.core import TyperCommand

from coordinator.admin.session import go

_NEGATIVE: Final = re.compile(r"-\.?\d.*")
Command = Callable[..., Coroutine[Any, Any, None]]
Parameters = Mapping[str, inspect.Parameter]


class TakesNumbers(TyperCommand):
    """A command line on which -5 is a number that cannot be used, and not an option that there is none of."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.ignore_unknown_options = any(_NEGATIVE.fullmatch(one) for one in args)
        return super().parse_args(ctx, args)


def parameters(function: Callable[..., Any]) -> Parameters:
    """Of a function, with what its annotations mean."""
    return inspect.signature(function, eval_str=True).parameters


def register(
    app: typer.Typer,
    name: str,
    command: Command,
    common: Parameters,
    start: Callable[[dict[str, Any], dict[str, Any]], Coroutine[Any, Any, None]],
) -> Command:
    """Make `async def command(first, ...)` a command line. Returns it as it is.

    Its parameters after the first become arguments and options behind RUN, and are followed by the `common` ones.
    `start` gets the values of the common ones and of its own, and calls it.
    """
    own = dict(parameters(command))
    del own[next(iter(own))]

    def run_command(**given: Any) -> None:
        shared = {key: given.pop(key) for key in common}
        go(start(shared, given))

    both = [common["run"], *own.values(), *(value for key, value in common.items() if key != "run")]
    # typer reads the signature: what it may not have twice is RUN, and options come in any order.
    run_command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in both]
    )
    run_command.__annotations__ = {one.name: one.annotation for one in both}
    run_command.__doc__ = command.__doc__
    app.command(name, cls=TakesNumbers)(run_command)
    return command
