"""What each command does, one file each; options from dataclasses, and which of them ``--help`` shows."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, field, fields
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo

T = TypeVar("T")
_FLAGS = {"time_budget_s": "--time-budget", "pretrained": "--pretrained/--random-teacher"}
_FLAGS |= {"timeout_s": "--timeout", "watch_s": "--watch"}


def argument(help: str, default: Any = MISSING) -> Any:
    """A field that is typed without a flag."""
    return field(default=default, metadata={"help": help, "argument": True})


def option(help: str, default: Any = MISSING, flag: str = "") -> Any:
    """A field that is typed behind a flag: its name's, or others (with spaces between)."""
    return field(default=default, metadata={"help": help, "flag": flag})


def takes(kind: type[T]) -> Callable[[Callable[[T], None]], Callable[..., None]]:
    """A command whose parameters are the fields of a dataclass, of which it is given one."""

    def decorate(command: Callable[[T], None]) -> Callable[..., None]:
        def run(**given: Any) -> None:
            values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
            command(kind(**{name: value for name, value in values.items() if value is not None}))

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(_parameters(kind))  # type: ignore[attr-defined]
        return run

    return decorate


def with_settings(*kinds: type, optional: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command with an option for every field of some dataclasses that has a help, beside its own.

    With ``optional`` an option that is not given is None, else the field's default.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        listed = [parameter for kind in kinds for parameter in _parameters(kind, optional)]
        command.__signature__ = signature.replace(parameters=[*own, *listed])  # type: ignore[attr-defined]
        return command

    return decorate


def _parameters(kind: Any, optional: bool = False) -> list[inspect.Parameter]:
    """The fields that have a help as typer reads them: several values are a list there, None where none is given."""
    hints, parameters = get_type_hints(kind), []
    for one in (one for one in fields(kind) if "help" in one.metadata):
        hint: Any = hints[one.name]
        default = inspect.Parameter.empty if one.default is MISSING else one.default
        if get_origin(hint) is tuple and get_args(hint)[-1] is ...:
            hint = list[get_args(hint)[0]]  # type: ignore[misc]
        if optional or default == ():
            hint, default = hint | None, None
        text, name = one.metadata["help"], one.name.replace("_", "-")
        switch = f"/--no-{name}" if one.default is True else ""  # what is on can be turned off
        flags = (one.metadata.get("flag") or _FLAGS.get(one.name, f"--{name}{switch}")).split()
        is_argument = one.metadata.get("argument", False)
        info = (
            typer.Argument(help=text) if is_argument else typer.Option(*flags, help=text, show_default=not optional)
        )
        place = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(one.name, place, default=default, annotation=Annotated[hint, info]))
    return parameters


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
