"""A request's images: several files of a form, or one image as the body itself. Names are labels, never paths."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request

from twinspect.inference.archives import Item
from twinspect.server.log import plain_text
from twinspect.server.refusals import Refused

FIELD = "file"
NAME_LENGTH = 200
_FORM = "multipart/form-data"
_RAW = "application/octet-stream"
_CURL = f"curl -F {FIELD}=@a.png"
_MOST_FIELDS = 16  # besides the files; none is used, some clients send a few


async def read_images(request: Request, most: int) -> list[Item]:
    """The images of a request.

    Raises:
        Refused: another type of content, no image, too many.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == _FORM:
        return await _from_form(request, most)
    if kind == _RAW or kind.startswith("image/"):
        name = label(request.headers.get("x-filename", "")) or "image"
        return [Item(name, data=await request.body())]
    raise Refused(
        415, "wrong_type",
        f"content type {plain_text(kind, 80)!r}; accepted {_FORM} with fields called {FIELD!r}, or one image as "
        f"image/* or {_RAW}; type: {_CURL}",
    )  # fmt: skip


async def _from_form(request: Request, most: int) -> list[Item]:
    try:
        form = await request.form(max_files=most, max_fields=_MOST_FIELDS)
    except Exception as error:
        detail = str(getattr(error, "detail", ""))
        if "Too many files" in detail:
            raise Refused(413, "too_many", f"more than {most} images in one request; send several") from None
        if detail:
            raise Refused(400, "bad_form", f"the form cannot be read: {detail}") from None
        raise
    try:
        files = [part for name, part in form.multi_items() if isinstance(part, UploadFile) and name == FIELD]
        if not files:
            found = ", ".join(
                f"{plain_text(name, 80)!r} with {'a file' if isinstance(part, UploadFile) else 'text'}"
                for name, part in form.multi_items()
            )
            raise Refused(
                400,
                "no_image",
                f"the form has no file in a field called {FIELD!r}, but {found or 'nothing'}; type: {_CURL}",
            )
        return [await _image(part, number) for number, part in enumerate(files)]
    finally:
        await form.close()


async def _image(part: UploadFile, number: int) -> Item:
    return Item(label(part.filename or "") or f"image-{number}", data=await part.read())


def label(name: str) -> str:
    """The last part of a name as the client gave it, safe to show and to keep; it is never opened."""
    return plain_text(name.replace("\\", "/").rsplit("/", 1)[-1], NAME_LENGTH)


def openapi_body() -> dict[str, Any]:
    """How the request body is described; it is read by hand, so that limits hold while it arrives."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    files = {"type": "array", "items": {"type": "string", "format": "binary"}}
    form = {"schema": {"type": "object", "required": [FIELD], "properties": {FIELD: files}}}
    return {"requestBody": {"required": True, "content": {_FORM: form, "image/*": binary, _RAW: binary}}}
