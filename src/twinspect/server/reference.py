"""The API in words, from the application's own description (OpenAPI), as Markdown: what ``/docs`` answers.

FastAPI's own page loads its scripts from elsewhere, which a machine on a line cannot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def reference(described: Mapping[str, Any]) -> Iterator[str]:
    """Routes and records, in lines.

    Args:
        described: the OpenAPI description.
    """
    for path, methods in described["paths"].items():
        for method, route in methods.items():
            yield f"## {method.upper()} {path}\n\n{route.get('description') or route.get('summary', '')}\n"
            rows: list[tuple[str, ...]] = [
                (f"`{p['name']}`", p["in"], _kind(p["schema"]), p.get("description", ""))
                for p in route.get("parameters", ())
            ]
            yield from table(("parameter", "in", "type", "meaning"), rows)
            answers = [
                (f"`{status}`", answer.get("description", ""), ", ".join(_body(answer)))
                for status, answer in route["responses"].items()
            ]
            yield from table(("status", "meaning", "body"), answers)
    yield "## Records\n"
    for name, schema in described.get("components", {}).get("schemas", {}).items():
        yield f"### {name}\n\n{schema.get('description', '')}\n"
        rows = [
            (f"`{field}`", _kind(value), value.get("description", ""))
            for field, value in schema.get("properties", {}).items()
        ]
        yield from table(("field", "type", "meaning"), rows)


def _body(answer: Mapping[str, Any]) -> Iterator[str]:
    for kind, content in answer.get("content", {}).items():
        yield f"{kind}: {_kind(content['schema'])}" if content.get("schema") else kind


def _kind(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(_kind(one) for one in schema["anyOf"])
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return str(schema.get("type", "any"))


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """A table in Markdown; nothing where it has no rows."""
    if rows:
        yield _row(head)
        yield "|" + "---|" * len(head)
        yield from (_row(cells) for cells in rows)
        yield ""


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(str(cell or "").replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
