"""A request's images: several files of a form, or one image as the body itself. Names are labels, never paths."""

from __future__ import annotations

from collections.abc import Iterator
from email.message import Message
from email.parser import HeaderParser
from email.utils import collapse_rfc2231_value
from typing import Any

from starlette.requests import Request

from twinspect.inference.streams import Item
from twinspect.server import Refused
from twinspect.server.log import plain_text

FIELD = "file"
_FORM = "multipart/form-data"
_RAW = "application/octet-stream"
_CURL = f"curl -F {FIELD}=@a.png"
_MOST_HEAD = 8192  # bytes of the headers of a part
_MOST_FIELDS = 16  # besides the images; none is used, some clients send a few


async def read_images(request: Request, most: int) -> list[Item]:
    """The images of a request; refused are another type of content, no image, and too many."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == _FORM:
        return await _from_form(request, most)
    if kind == _RAW or kind.startswith("image/"):
        name = _decoded(request.headers.get("x-filename", "").encode("latin-1"))
        return [Item(label(name) or "image", data=await request.body())]
    raise Refused(
        415, "wrong_type",
        f"content type {plain_text(kind, 80)!r}; accepted {_FORM} with fields called {FIELD!r}, or one image as "
        f"image/* or {_RAW}; type: {_CURL}",
    )  # fmt: skip


async def _from_form(request: Request, most: int) -> list[Item]:
    head = Message()
    head["content-type"] = request.headers["content-type"]
    boundary = head.get_boundary()
    if not boundary:
        raise _bad_form(f"its content type has no boundary; type: {_CURL}")
    body = await request.body()
    images: list[Item] = []
    others: list[str] = []
    for part, data in _parts(body, b"--" + boundary.encode("latin-1", "replace")):
        name, field = _parameter(part, "filename"), _parameter(part, "name") or ""
        if name is not None and field == FIELD:
            images.append(Item(label(name) or f"image-{len(images)}", data=data))
        else:
            others.append(f"{plain_text(field, 80)!r} with {'text' if name is None else 'a file'}")
        if len(images) > most:
            raise Refused(413, "too_many", f"more than {most} images in one request; send several")
        if len(others) > _MOST_FIELDS:
            raise _bad_form(f"more than {_MOST_FIELDS} fields besides its images")
    if not images:
        names = ", ".join(others) or "nothing"
        raise Refused(
            400, "no_image", f"the form has no file in a field called {FIELD!r}, but {names}; type: {_CURL}"
        )
    return images


def _parts(body: bytes, mark: bytes) -> Iterator[tuple[Message, bytes]]:
    """Headers and content of every part of a form (RFC 7578).

    Starlette's parser passes over ``filename*``, which .NET, Java and requests with urllib3 1 send for every name
    that is not ASCII, and over a last part that was cut off; and it writes large files to the disk.
    """
    start = body.find(mark) + len(mark)
    if start < len(mark):
        raise _bad_form("its boundary is nowhere in it")
    while body[start : start + 2] != b"--":
        head_end = body.find(b"\r\n\r\n", start, start + _MOST_HEAD)
        end = body.find(b"\r\n" + mark, start)
        if not 0 <= head_end < end:
            raise _bad_form(f"a part has no end, or no end of its headers within {_MOST_HEAD} bytes")
        yield HeaderParser().parsestr(_decoded(body[start:head_end]).lstrip()), body[head_end + 4 : end]
        start = end + 2 + len(mark)


def _bad_form(why: str) -> Refused:
    return Refused(400, "bad_form", f"the form cannot be read: {why}")


def _decoded(header: bytes) -> str:
    """UTF-8, as nearly all clients send it, else Latin-1."""
    try:
        return header.decode("utf-8")
    except UnicodeDecodeError:
        return header.decode("latin-1")


def _parameter(head: Message, name: str) -> str | None:
    """A parameter of the content disposition; ``name*`` (RFC 2231) wins over ``name``, whose ASCII is a makeshift."""
    values = [value for key, value in head.get_params([], "content-disposition") if key.lower() == name]
    return collapse_rfc2231_value(values[-1]) if values else None


def label(name: str) -> str:
    """The last part of a name as the client gave it, safe to show and to keep; it is never opened."""
    return plain_text(name.replace("\\", "/").rsplit("/", 1)[-1])


def openapi_body() -> dict[str, Any]:
    """How the request body is described."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    files = {"type": "array", "items": {"type": "string", "format": "binary"}}
    form = {"schema": {"type": "object", "required": [FIELD], "properties": {FIELD: files}}}
    return {"requestBody": {"required": True, "content": {_FORM: form, "image/*": binary, _RAW: binary}}}
