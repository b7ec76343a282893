"""Where a model runs: a device by name, or words about what there is. Imports torch when asked, not before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from twinspect.errors import ConfigError


def choose_device(name: str) -> str:
    """The device that is meant: ``auto`` is the GPU where there is one.

    Args:
        name: ``auto``, ``cpu``, ``cuda``, ``cuda:1``.

    Raises:
        ConfigError: this machine, or this build of torch, does not have it.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ConfigError(
            f"--device {name} cannot be used ({str(error).splitlines()[0]}); accepted here: "
            f"{', '.join(accepted_devices())}"
        ) from None
    return name


@contextmanager
def in_fp32(device: str) -> Iterator[None]:
    """While entered, fp32 on a GPU means fp32.

    Convolutions there round to ten bits (TF32) unless told not to; caches would then differ between devices, and
    thresholds would be those of other features than a CPU sees.
    """
    import torch

    if not device.startswith("cuda"):
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def accepted_devices() -> list[str]:
    """What ``--device`` may be on this machine."""
    import torch

    count = torch.cuda.device_count()
    return ["auto", "cpu", *(["cuda"] if count else []), *(f"cuda:{number}" for number in range(count))]
