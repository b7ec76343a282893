"""What an operator may set, with limits that hold against strangers. No web framework here."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field

from twinspect.data.images import ImageLimits
from twinspect.errors import ConfigError

MEGABYTE = 1 << 20


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything the server can be told; the defaults suit one line PC.

    Attributes:
        host, port: address to listen on.
        api_key: what clients must send; may be empty on a loopback address only.
        max_batch: most images in one call of the model.
        max_wait_ms: longest time a call of the model waits for images that are being decoded.
        queue: images accepted and not yet answered; more are refused with 429.
        timeout_s: from acceptance of a request to its answer.
        body_timeout_s: for a client to send its request, and to take a piece of the answer.
        header_timeout_s: for a client to send the head of its request.
        max_body_mb: size of one request.
        max_memory_mb: size of all requests being read or answered together.
        max_files: images in one request.
        max_megapixels: size of one image.
        decoders: threads that decode.
        watch_s: how often bundle files are looked at for a new version; 0 turns it off.
        drain_s: longest time accepted requests have after the signal to stop.
        maps_mb: memory for maps that can be fetched after the answer.
        log_required: refuse to answer what the inspection log cannot keep.
        log_days: age at which rows of the log are deleted; 0 keeps them.
        drift_rate: chance of any false drift alarm, ever.
        root_path: where a proxy shows this server to its clients, such as ``/inspect``; empty for the top.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = field(default="", repr=False)
    max_batch: int = 16
    max_wait_ms: float = 5.0
    queue: int = 64
    timeout_s: float = 30.0
    body_timeout_s: float = 20.0
    header_timeout_s: float = 10.0
    max_body_mb: float = 64.0
    max_memory_mb: float = 512.0
    max_files: int = 32
    max_megapixels: float = 50.0
    decoders: int = 2
    watch_s: float = 5.0
    drain_s: float = 30.0
    maps_mb: float = 64.0
    log_required: bool = False
    log_days: float = 0.0
    drift_rate: float = 0.01
    root_path: str = ""

    def __post_init__(self) -> None:
        positive = (
            "max_batch", "queue", "timeout_s", "body_timeout_s", "header_timeout_s", "max_body_mb", "max_memory_mb",
            "max_files", "max_megapixels", "decoders", "drain_s",
        )  # fmt: skip
        for name in positive:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{_option(name)} {getattr(self, name):g}: accepted above 0")
        for name in ("max_wait_ms", "watch_s", "maps_mb", "log_days"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{_option(name)} {getattr(self, name):g}: accepted 0 or more")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port}: accepted 1 to 65535 (0 takes a free one)")
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

    @property
    def limits(self) -> ImageLimits:
        """What one image may hold."""
        return ImageLimits(max_pixels=int(self.max_megapixels * 1e6))


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only; a name other than localhost counts as reachable."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.rstrip(".").lower() == "localhost"


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
