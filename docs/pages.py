"""Pages of the site that are made when it is built: those of the repository's root, and the references.

MkDocs calls these functions (``hooks`` in mkdocs.yml).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from twinspect.config import ModelConfig, TrainConfig

ROOT = Path(__file__).parents[1]
# Defaults of the options that are settings of a run: not given is None there.
SETTINGS = {one.name: one.default for kind in (ModelConfig, TrainConfig) for one in fields(kind)}
# Files outside of docs/ that are pages, too.
OF_ROOT = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "examples/README.md": "examples.md",
}
_LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s:#]+)(#[^)\s]*)?\)")
_FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie in no file of docs/."""
    for path, page in OF_ROOT.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text(encoding="utf-8")))
    files.append(File.generated(config, "reference/cli.md", content="\n".join(cli_page())))
    files.append(File.generated(config, "reference/http.md", content="\n".join(http_page())))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links of the repository to pages of the site; what is no page stays as text."""
    here = next((path for path, name in OF_ROOT.items() if name == page.file.src_uri), f"docs/{page.file.src_uri}")
    known = {file.src_uri for file in files}

    def led(match: re.Match[str]) -> str:
        target = os.path.normpath(os.path.join(os.path.dirname(here), match[2]))
        name = OF_ROOT.get(target, target.removeprefix("docs/"))
        if name not in known:
            return match[1][1:-1] if not match[1].startswith("!") else match[0]
        start = os.path.dirname(page.file.src_uri) or "."
        return f"{match[1]}({os.path.relpath(name, start)}{match[3] or ''})"

    parts = _FENCED.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(led, part) for part in parts)


# ------------------------------------------------------------------------------------------------ command line


def cli_page() -> Iterator[str]:
    """Every command with its arguments and options, as the program has them."""
    import typer

    from twinspect.cli import app

    yield "# Command line\n"
    yield "Made from the program itself. `twinspect COMMAND --help` says the same. Commands with many options show "
    yield "the usual ones there, and all of them with `--help-all`.\n"
    yield from _command(typer.main.get_command(app), "twinspect")


def _command(command: Any, name: str) -> Iterator[str]:
    inner = getattr(command, "commands", {})
    if not inner:
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        usage = " ".join([name, "[OPTIONS]", *(_argument(p) for p in arguments)])
        yield f"## {name}\n\n{command.help}\n\n```text\n{usage}\n```\n"
        yield from table(("argument", "meaning"), [(f"`{p.name.upper()}`", p.help) for p in arguments])
        options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
        rows = [(", ".join(f"`{one}`" for one in (*p.opts, *p.secondary_opts)), _default(p), p.help) for p in options]
        yield from table(("option", "default", "meaning"), rows)
    for key in sorted(inner):
        yield from _command(inner[key], f"{name} {key}")


def _argument(parameter: Any) -> str:
    shown = parameter.name.upper() + ("..." if parameter.nargs != 1 else "")
    return shown if parameter.required else f"[{shown}]"


def _default(option: Any) -> str:
    if option.required:
        return "needed"
    value = SETTINGS.get(option.name, option.default) if option.default is None else option.default
    shown = isinstance(value, (str, int, float, Path)) and not isinstance(value, bool) and str(value)
    return f"`{value}`" if shown else ""


# ---------------------------------------------------------------------------------------------------- HTTP API


def http_page() -> Iterator[str]:
    """Routes and records of the server."""
    from twinspect.server.app import build_app
    from twinspect.server.settings import Settings

    yield "# HTTP API\n"
    yield "Made from the server's own description. A running server gives that at `/openapi.json`, and shows it at "
    yield "`/docs`. "
    yield "[The server](../deploy.md) says how to start one and how it behaves.\n"
    yield from reference(build_app(Settings(), {}).openapi())


def reference(described: Mapping[str, Any]) -> Iterator[str]:
    """Routes and records of an OpenAPI description as lines of Markdown."""
    for path, methods in described["paths"].items():
        for method, route in methods.items():
            yield f"## {method.upper()} {path}\n\n{route.get('description') or route.get('summary', '')}\n"
            rows = []
            for parameter in route.get("parameters", ()):
                kind, meaning = _kind(parameter["schema"]), parameter.get("description", "")
                rows.append((f"`{parameter['name']}`", parameter["in"], kind, meaning))
            yield from table(("parameter", "in", "type", "meaning"), rows)
            content = route["responses"]["200"].get("content", {})
            bodies = (f"{kind} {_kind(body.get('schema', {'type': ''}))}".strip() for kind, body in content.items())
            others = [status for status in route["responses"] if status != "200"]
            errors = f"; with status {', '.join(others)}: ErrorAnswer" if others else ""
            yield f"Answer: {', '.join(bodies)}{errors}.\n"
    yield "## Records\n"
    for name, schema in described.get("components", {}).get("schemas", {}).items():
        yield f"### {name}\n\n{schema.get('description', '')}\n"
        fields = schema.get("properties", {}).items()
        cells = [(f"`{field}`", _kind(value), value.get("description", "")) for field, value in fields]
        yield from table(("field", "type", "meaning"), cells)


def _kind(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if words := schema.get("enum", [schema["const"]] if "const" in schema else None):
        return " or ".join(f"`{word}`" if word else "empty" for word in words)
    if "anyOf" in schema:
        return " or ".join(_kind(choice) for choice in schema["anyOf"])
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return str(schema.get("type", "any"))


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    """A table in Markdown; nothing where it has no rows."""
    if not rows:
        return
    for cells in (head, ["---"] * len(head), *rows):
        yield "| " + " | ".join(str(cell or "").replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
    yield ""
