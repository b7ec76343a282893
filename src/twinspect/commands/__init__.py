"""What each command does, one file each; and which of its options ``--help`` shows."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_args

import typer
from typer.models import OptionInfo


def usual(*shown: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose ``--help`` shows the parameters named here, and whose ``--help-all`` shows every one."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        parameters = [_marked(one, one.name not in shown) for one in signature.parameters.values()]
        help_all = typer.Option("--help-all", callback=_help_all, is_eager=True, help="Show every option, and stop.")
        parameters.append(
            inspect.Parameter(
                "help_all", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, help_all]
            )
        )

        @functools.wraps(command)
        def run(help_all: bool = False, **values: Any) -> None:
            command(**values)

        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _marked(parameter: inspect.Parameter, hidden: bool) -> inspect.Parameter:
    """The same parameter, its option hidden or not; the option's description may be shared with other commands."""
    kind, *said = get_args(parameter.annotation) or (parameter.annotation,)
    if not (said and isinstance(said[0], OptionInfo)):
        return parameter
    option = copy.copy(said[0])
    option.hidden = hidden
    return parameter.replace(annotation=Annotated[kind, option])


def _help_all(context: typer.Context, asked: bool) -> None:
    if asked:
        for parameter in context.command.params:
            parameter.hidden = False  # type: ignore[attr-defined]
        typer.echo(context.get_help())
        raise typer.Exit
