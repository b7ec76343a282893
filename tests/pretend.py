"""A device that is none: tensors that say they lie on ``pretend:0``, computed on the CPU; mixing both is an error.

As strict as a GPU about where tensors lie, and as exact as the CPU: a run on it must give the same model but for the
rounding of attention, which it computes another way. It shows what is left on the wrong device; nothing about speed,
or about a GPU's own arithmetic.

    python pretend.py DATA MODEL TEACHER     trains on both and compares; prints "same"
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import run_config, train_samples
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
NAME = "pretend"
# What may look at both sides: copies, and indices, which a GPU takes from the CPU.
CROSSES = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default}


class OnPretend(Tensor):
    """A CPU tensor that claims to lie elsewhere."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnPretend:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=f"{NAME}:0", requires_grad=False,
        )  # fmt: skip

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def tolist(self) -> Any:
        """Torch refuses it for subclasses."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Pretending(TorchDispatchMode):
    """Catches what makes new tensors, which no argument gives away."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run on the CPU; the answer lies where the arguments do, or where it is asked for."""
    given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    there = any(isinstance(one, OnPretend) for one in given)
    strangers = [one for one in given if not isinstance(one, OnPretend) and one.dim()]
    if there and strangers and func not in CROSSES:
        raise RuntimeError(f"{func}: expected all tensors on one device, found {NAME}:0 and cpu")
    if isinstance(kwargs.get("generator"), torch.Generator) and there:
        raise RuntimeError(f"{func}: a generator of the CPU for a tensor on {NAME}:0")
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}
    bare = tree_map(lambda one: one.inner if isinstance(one, OnPretend) else one, (args, kwargs))
    found = func(*bare[0], **bare[1])
    if found is None:
        return None
    if func._schema.name.endswith("_") and not func._schema.name.endswith("__"):
        return args[0]
    return tree_map(lambda one: OnPretend(one) if there and isinstance(one, Tensor) else one, found)


class Module(_DummyBackendModule):
    """What torch asks a device's module for."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def manual_seed_all(self, seed: int) -> None:
        """Noise comes from the CPU's generator."""

    def _is_in_bad_fork(self) -> bool:
        return False


def main(data: Path, model: str, teacher: str) -> None:
    """Train the same model on the CPU and on the pretended device."""
    from twinspect.training.fit import fit

    _setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    plain = torch.tensor  # the one maker of tensors that no mode catches

    def tensor(values: Any, device: Any = None, **options: Any) -> Tensor:
        return plain(values, **options).to(device or "cpu")

    torch.tensor = tensor
    samples, found = train_samples(data), []
    for device in ("cpu", f"{NAME}:0"):
        for cache_gb in (20.0, 0.0):
            config = run_config(teacher, model=model, device=device, steps=3, easy_ramp=2, cache_gb=cache_gb)
            with Pretending():
                fitted = fit(samples, config)
            assert {value.device.type for value in fitted.model.state_dict().values()} == {"cpu"}
            found.append(fitted)
    for on_cpu, elsewhere in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(
            elsewhere.model.student.state_dict(), on_cpu.model.student.state_dict(), atol=1e-5, rtol=1e-4
        )
        ours, theirs = on_cpu.decision.good, elsewhere.decision.good
        assert (list(ours.key), list(ours.class_name)) == (list(theirs.key), list(theirs.class_name))
        np.testing.assert_allclose(theirs.score, ours.score, atol=1e-2, rtol=1e-2)
        np.testing.assert_allclose(theirs.peak, ours.peak, atol=1e-2, rtol=1e-2)
    print("same")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
