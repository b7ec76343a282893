"""What each command does, one file each; options from dataclasses, and which of them ``--help`` shows."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, get_args

import typer
from typer.models import OptionInfo

_FLAGS = {"time_budget_s": "--time-budget", "pretrained": "--pretrained/--random-teacher"}
_FLAGS |= {"timeout_s": "--timeout", "watch_s": "--watch"}


def with_settings(*kinds: type, optional: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command with an option for every field of some dataclasses that has a help.

    With ``optional`` an option that is not given is None, else the field's default.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        for one in (field for kind in kinds for field in fields(kind) if "help" in field.metadata):
            name = one.name.replace("_", "-")
            switch = one.default is True  # it can be turned off
            flag = _FLAGS.get(one.name, f"--{name}/--no-{name}" if switch else f"--{name}")
            option = typer.Option(flag, help=one.metadata["help"], show_default=not optional)
            kind: Any = type(one.default) | None if optional else type(one.default)
            default = None if optional else one.default
            own.append(
                inspect.Parameter(
                    one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
                )
            )
        command.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
        return command

    return decorate


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
