"""What an operator may set, with limits that hold against strangers. No web framework here."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from twinspect.config import ABOVE_ZERO, Range, check_options, option
from twinspect.errors import ConfigError, DataError
from twinspect.files import read_text

KEY_VARIABLE = "TWINSPECT_API_KEY"
_SOME = Range(1)


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything the server can be told; the defaults suit one line PC."""

    host: str = option("Address to listen on; any that other machines reach needs a key.", "127.0.0.1")
    port: int = option("Port; 0 takes a free one.", 8000, accepts=Range(0, 65535))
    api_key: str = field(default="", repr=False)  # may be empty on a loopback address only
    log_required: bool = option("No answer without a row in the log.", False)
    log_days: float = option("Delete rows older than so many days; 0 keeps them.", 0.0)
    log_thumbnails: int = option("Keep a picture of every decision, longest side in pixels; 0: none.", 0)
    max_batch: int = option("Most images in one call of the model.", 16, accepts=_SOME)
    max_wait_ms: float = option("Longest wait of a call for images being decoded.", 5.0)
    queue: int = option("Images accepted at a time; more are refused (429).", 64, accepts=_SOME)
    timeout_s: float = option("Seconds from acceptance to the answer.", 30.0, accepts=ABOVE_ZERO)
    max_body_mb: float = option("Largest size of a request.", 64.0, accepts=ABOVE_ZERO)
    max_memory_mb: float = option("Largest size of all requests being answered.", 512.0, accepts=ABOVE_ZERO)
    max_files: int = option("Most images in a request.", 32, accepts=_SOME)
    max_megapixels: float = option("Largest size of an image.", 50.0, accepts=ABOVE_ZERO)
    root_path: str = option("Where a proxy shows the server, such as /inspect.", "")
    watch_s: float = option("Seconds between looks for a new version of a file; 0: never.", 5.0)
    body_timeout_s: float = 20.0  # for a client to send its request, and to take a piece of the answer
    header_timeout_s: float = 10.0  # for a client to send the head of its request

    def __post_init__(self) -> None:
        check_options(self)
        if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)*", self.root_path):
            raise ConfigError(
                f"--root-path {self.root_path}: accepted a path such as /inspect, with a slash before it and none "
                "behind, of letters, digits, - . _ ~"
            )
        if self.max_body_mb > self.max_memory_mb:
            raise ConfigError(
                f"--max-body-mb {self.max_body_mb:g} is more than --max-memory-mb {self.max_memory_mb:g} for all "
                "requests together; raise the second"
            )
        if not self.api_key and not is_loopback(self.host):
            raise ConfigError(
                f"--host {self.host} can be reached from other machines, so a key is needed: put one into a file "
                "(such as: openssl rand -hex 32 > key) and add --api-key-file key, or set TWINSPECT_API_KEY"
            )
        if self.api_key and (len(self.api_key) < 16 or not self.api_key.isascii() or not self.api_key.isprintable()):
            raise ConfigError(
                f"the API key has {len(self.api_key)} characters; accepted 16 or more printable ASCII characters, "
                "such as those of: openssl rand -hex 32"
            )


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only; a name other than localhost counts as reachable."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.rstrip(".").lower() == "localhost"


def read_key(file: Path | None, environment: Mapping[str, str] = os.environ) -> str:
    """The API key from a file or the environment; never from the command line, where other users could read it."""
    if file is None:
        return environment.get(KEY_VARIABLE, "").strip()
    try:
        return read_text(file).strip()
    except DataError as error:
        raise ConfigError(f"--api-key-file {error}") from None


def named_paths(texts: Sequence[str]) -> dict[str, Path]:
    """``NAME=FILE`` or ``FILE`` (its stem is the name) to files by name. A path may hold an equals sign itself."""
    paths: dict[str, Path] = {}
    for text in texts:
        name, _, file = text.partition("=")
        if Path(text).is_file() or not file:
            name, file = Path(text).stem, text
        if not Path(file).is_file():
            raise ConfigError(f"no such model: {text}. Make one with: twinspect fit DATA --out FILE.twin")
        if not re.fullmatch(r"[\w.-]+", name):
            raise ConfigError(f"{name!r} cannot be part of an address; type NAME={file}, of letters, digits, - _ .")
        if name in paths:
            raise ConfigError(f"two models are called {name}: {paths[name]} and {file}; type NAME={file}")
        paths[name] = Path(file)
    return paths
