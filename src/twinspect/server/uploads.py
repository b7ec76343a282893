"""A request's images: several files of a form, or one image as the body itself. Names are labels, never paths."""

from __future__ import annotations

from email.errors import MessageError
from email.header import decode_header, make_header
from email.message import Message
from email.utils import collapse_rfc2231_value
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser
from starlette.requests import Request

from twinspect.inference.archives import Item
from twinspect.server.guard import Refused
from twinspect.server.log import plain_text

FIELD = "file"
NAME_LENGTH = 200
_FORM = "multipart/form-data"
_RAW = "application/octet-stream"
_CURL = f"curl -F {FIELD}=@a.png"
_MOST_HEAD = 8192  # bytes of one header of a part
_MOST_FIELDS = 16  # besides the files; none is used, some clients send a few


async def read_images(request: Request, most: int) -> list[Item]:
    """The images of a request; refused are another type of content, no image, and too many."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == _FORM:
        return await _from_form(request, most)
    if kind == _RAW or kind.startswith("image/"):
        head = Message()
        head["content-disposition"] = _decoded(request.headers.get("content-disposition", "").encode("latin-1"))
        name = _decoded(request.headers.get("x-filename", "").encode("latin-1")) or _parameter(head, "filename")
        return [Item(label(name or "") or "image", data=await request.body())]
    raise Refused(
        415, "wrong_type",
        f"content type {plain_text(kind, 80)!r}; accepted {_FORM} with fields called {FIELD!r}, or one image as "
        f"image/* or {_RAW}; type: {_CURL}",
    )  # fmt: skip


async def _from_form(request: Request, most: int) -> list[Item]:
    form, head = _Form(most), Message()
    head["content-type"] = request.headers["content-type"]
    boundary = head.get_boundary()
    if not boundary:
        raise Refused(400, "bad_form", f"the form cannot be read: its content type has no boundary; type: {_CURL}")
    try:
        parser = MultipartParser(boundary, form.callbacks())
        async for chunk in request.stream():
            parser.write(chunk)
    except (FormParserError, UnicodeEncodeError) as error:
        raise Refused(400, "bad_form", f"the form cannot be read: {error}") from None
    if not form.images:
        others = ", ".join(form.others) or "nothing"
        raise Refused(
            400, "no_image", f"the form has no file in a field called {FIELD!r}, but {others}; type: {_CURL}"
        )
    return [Item(label(name) or f"image-{number}", data=data) for number, (name, data) in enumerate(form.images)]


class _Form:
    """The parts of a form, collected while they arrive.

    The names of the parts are read by the standard library: Starlette and python-multipart pass over ``filename*``,
    which .NET, Java and requests with urllib3 1 send for every name that is not ASCII.

    Attributes:
        images: (name, content) of every file in a field called `FIELD`.
        others: what the other parts are, in words.
    """

    def __init__(self, most: int) -> None:
        self.most, self.files = most, 0
        self.images: list[tuple[str, bytes]] = []
        self.others: list[str] = []
        self._key, self._value = b"", b""
        self._head, self._data, self._file, self._image = Message(), bytearray(), False, False

    def callbacks(self) -> Any:
        """For `MultipartParser`."""
        return {
            "on_part_begin": self._begin, "on_header_field": self._on_key, "on_header_value": self._on_value,
            "on_header_end": self._on_header, "on_headers_finished": self._on_head, "on_part_data": self._on_data,
            "on_part_end": self._end,
        }  # fmt: skip

    def _begin(self) -> None:
        self._head, self._data = Message(), bytearray()

    def _on_key(self, data: bytes, start: int, end: int) -> None:
        self._key += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        if len(self._value) > _MOST_HEAD:
            raise Refused(400, "bad_form", f"the form cannot be read: a header of more than {_MOST_HEAD} bytes")

    def _on_header(self) -> None:
        self._head[self._key.decode("latin-1")] = _decoded(self._value)
        self._key, self._value = b"", b""

    def _on_head(self) -> None:
        kind = self._head.get_content_type()  # some clients name the kind of a part, but no file
        self._file = _parameter(self._head, "filename") is not None or kind == _RAW or kind.startswith("image/")
        self._image = self._file and _parameter(self._head, "name") == FIELD
        self.files += self._file
        if self.files > self.most:
            raise Refused(413, "too_many", f"more than {self.most} images in one request; send several")
        if len(self.others) >= _MOST_FIELDS:
            raise Refused(400, "bad_form", f"the form has more than {_MOST_FIELDS} fields besides its images")

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._image:
            self._data += data[start:end]

    def _end(self) -> None:
        if self._image:
            self.images.append((_parameter(self._head, "filename") or "", bytes(self._data)))
            return
        name = plain_text(_parameter(self._head, "name") or "", 80)
        self.others.append(f"{name!r} with {'a file' if self._file else 'text'}")


def _decoded(header: bytes) -> str:
    """UTF-8, as nearly all clients send it, else Latin-1."""
    try:
        return header.decode("utf-8")
    except UnicodeDecodeError:
        return header.decode("latin-1")


def _parameter(head: Message, name: str) -> str | None:
    """A parameter of the content disposition; ``name*`` (RFC 2231) wins over ``name``, whose ASCII is a makeshift."""
    values = [value for key, value in head.get_params([], "content-disposition") if key.lower() == name]
    if not values:
        return None
    text = collapse_rfc2231_value(values[-1])
    try:
        return str(make_header(decode_header(text))) if "=?" in text else text  # RFC 2047, of mail programs and .NET
    except (MessageError, LookupError, ValueError):  # what only looks like it
        return text


def label(name: str) -> str:
    """The last part of a name as the client gave it, safe to show and to keep; it is never opened."""
    return plain_text(name.replace("\\", "/").rsplit("/", 1)[-1], NAME_LENGTH)


def openapi_body() -> dict[str, Any]:
    """How the request body is described; it is read by hand, so that limits hold while it arrives."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    files = {"type": "array", "items": {"type": "string", "format": "binary"}}
    form = {"schema": {"type": "object", "required": [FIELD], "properties": {FIELD: files}}}
    return {"requestBody": {"required": True, "content": {_FORM: form, "image/*": binary, _RAW: binary}}}
