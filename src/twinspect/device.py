"""Where a model runs: a device by name, or words about what there is. Imports torch when asked, not before."""

from __future__ import annotations

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


def accepted_devices() -> list[str]:
    """What ``--device`` may be on this machine."""
    import torch

    count = torch.cuda.device_count()
    return ["auto", "cpu", *(["cuda"] if count else []), *(f"cuda:{number}" for number in range(count))]
