"""What each command does, one file each, and how the fields of its dataclass become its options."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from importlib import import_module
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from twinspect.config import check_options, flag_of


@dataclass(frozen=True, slots=True)
class Command:
    """A row of `cli.COMMANDS`.

    Attributes:
        name: what is typed, such as ``data inspect``.
        run: ``module:function`` of this folder. It is called with the options, a dict of the settings where there
            are some, and a `Console`.
        options: dataclass; its docstring is the help, its fields that have a help are the options.
        example: stands under the help.
        settings: further dataclasses whose fields are options too.
        optional: whether a setting that is not typed is None, and not its default.
        shown: options that ``--help`` shows; the others need ``--help-all``. Without any it shows all.
    """

    name: str
    run: str
    options: type
    example: str
    settings: tuple[type, ...] = ()
    optional: bool = False
    shown: tuple[str, ...] = ()

    def add_to(self, app: typer.Typer) -> None:
        """Make it a command of an app."""

        def run(**typed: Any) -> None:
            from twinspect.console import Console

            values = {name: tuple(value) if isinstance(value, list) else value for name, value in typed.items()}
            of_options = {one.name: values.pop(one.name) for one in fields(self.options)}
            options = self.options(**{name: value for name, value in of_options.items() if value is not None})
            values.pop("help_all", None)
            quiet = getattr(options, "json_file", "") == "-" or getattr(options, "as_json", False)
            module, _, function = self.run.partition(":")
            with Console(quiet) as console:
                check_options(options)
                called = getattr(import_module(f"twinspect.commands.{module}"), function)
                called(options, *([values] if self.settings else []), console)

        run.__signature__ = inspect.Signature(list(self._parameters()))  # type: ignore[attr-defined]
        name, example = self.name.split()[-1], f"\b\nExample:\n  {self.example}"
        app.command(name, help=self.options.__doc__, epilog=example)(run)

    def _parameters(self) -> Iterator[inspect.Parameter]:
        for kind in (self.options, *self.settings):
            hints = get_type_hints(kind)
            for one in (one for one in fields(kind) if "help" in one.metadata):
                yield self._parameter(one, hints[one.name], self.optional and kind in self.settings)
        if self.shown:
            info = typer.Option("--help-all", callback=_help_all, is_eager=True, help="Show every option, and stop.")
            yield _keyword("help_all", False, Annotated[bool, info])

    def _parameter(self, one: Any, hint: Any, optional: bool) -> inspect.Parameter:
        """A field as typer reads it: several values are a list there, None where none is given."""
        default = inspect.Parameter.empty if one.default is MISSING else one.default
        if get_origin(hint) is tuple and get_args(hint)[-1] is ...:
            hint = list[get_args(hint)[0]]  # type: ignore[misc]
        if optional or default == ():
            hint, default = hint | None, None
        text = one.metadata["help"]
        if one.metadata.get("argument"):
            return _keyword(one.name, default, Annotated[hint, typer.Argument(help=text)])
        flags, hidden = flag_of(one).split(), bool(self.shown) and one.name not in self.shown
        flags = ["-o", *flags] if "--out" in flags else flags
        info = typer.Option(*flags, help=text, show_default=not optional, hidden=hidden)
        return _keyword(one.name, default, Annotated[hint, info])


def _keyword(name: str, default: Any, hint: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _help_all(context: typer.Context, asked: bool) -> None:
    if asked:
        for parameter in context.command.params:
            parameter.hidden = False  # type: ignore[attr-defined]
        typer.echo(context.get_help())
        raise typer.Exit
