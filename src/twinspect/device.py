"""Where a model runs: devices by name and the processor's cores. Imports torch when asked, not before."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from twinspect.errors import ConfigError

# Turns that a thread of torch waits for the others before it sleeps; each takes 10 to 50 ns. OpenMP's own 300,000
# take milliseconds of a core that another process could have used: beside one busy process everything takes three
# times as long. None at all costs a quarter of the speed of a machine with nothing else to do (docs/results.md).
_SPINS = 4000
_WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


PRECISIONS = ("fp32", "tf32")  # of predictions on a GPU


def share_cores() -> None:
    """Let the threads of torch get along with other processes: they wait briefly, on the cores that there are.

    Call it before torch is imported, which reads the environment once. What the user has set holds.
    """
    if "torch" in sys.modules:
        return
    if not any(name in os.environ for name in _WAITING):
        os.environ[_WAITING[0]] = str(_SPINS)
    if granted_threads() and not any(name in os.environ for name in _THREADS):
        os.environ[_THREADS[0]] = str(granted_threads())


def usable_cores() -> int:
    """Cores that this process may use: a container often has fewer than the machine."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        cores = os.cpu_count() or 1
    return granted_threads() or cores


def granted_threads() -> int:
    """As many threads as a container is granted cores' time for; 0 without a limit, where runtimes know best."""
    quota = cpu_quota()
    return max(1, int(quota)) if quota < (os.cpu_count() or 1) else 0


def cpu_quota(groups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float:
    """Cores' worth of time that Linux's control groups (version 2) grant to this process, or infinity."""
    lines = membership.read_text(encoding="utf-8").splitlines() if membership.is_file() else []
    name = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    group, limits = groups / name, [math.inf]  # the name may be that outside a container; what is mounted counts
    for folder in (group, *group.parents):
        if folder.is_relative_to(groups):
            with suppress(OSError, ValueError):
                quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
                limits.append(math.inf if quota == "max" else int(quota) / int(period))
    return min(limits)


def choose_device(name: str) -> str:
    """The device that is meant (``auto``: a GPU where there is one); a ConfigError where torch has none such here."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        count = torch.cuda.device_count()
        here = ["auto", "cpu", *(["cuda"] if count else []), *(f"cuda:{number}" for number in range(count))]
        raise ConfigError(
            f"--device {name} cannot be used ({str(error).splitlines()[0]}); accepted here: {', '.join(here)}"
        ) from None
    return name


@contextmanager
def gpu_arithmetic(device: str, precision: str = "fp32") -> Iterator[None]:
    """While entered, products on a GPU are what ``precision`` says: ``fp32``, or ``tf32``, which keeps ten bits.

    Torch's own choice for convolutions is tf32. Caches would then differ between devices, and thresholds would be
    those of other features than a CPU sees.
    """
    import torch

    if not device.startswith("cuda"):  # where the flags do not matter; reading them raises if a caller set others
        yield
        return
    networks, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = networks.allow_tf32, products.allow_tf32
    try:
        networks.allow_tf32 = products.allow_tf32 = precision == "tf32"
        yield
    finally:
        networks.allow_tf32, products.allow_tf32 = before


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT = 2**31 - 1  # bytes; the largest value the call takes


@lru_cache(maxsize=1)
def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks for the next tensor instead of returning each to the kernel; whether it could.

    A large tensor is otherwise mapped and unmapped every time, and the kernel clears every page of it: half of a
    network's time on a CPU goes there (0.40 s instead of 0.21 s for 16 images of 256 pixels, EfficientNet-Lite0).
    Peak memory does not change; between peaks the process holds on to it. Without glibc: nothing.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        library = ctypes.CDLL("libc.so.6")
        return bool(library.mallopt(_M_MMAP_THRESHOLD, _KEPT) and library.mallopt(_M_TRIM_THRESHOLD, _KEPT))
    except (OSError, AttributeError):
        return False


def peak_mb() -> float | None:
    """Largest resident memory of this process so far; Windows does not say."""
    try:  # Linux: what getrusage says of a child begins with its parent's memory
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
