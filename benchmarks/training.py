"""Where the time of training goes: every part of a step beside the least time this machine could need for it.

The bound of a part is the larger of two: its arithmetic at the rate of a large matrix product, and the bytes its
operations read and write, one operation at a time, at the rate of a large copy. Both rates are measured in the same
run. A part far above its bound is overhead, or small operations; one at its bound can only be made smaller.

    PYTHONPATH=src python benchmarks/training.py model.twin --batch 16 --images good/

takes steps from the bundle's model; its file is not changed, and the cache is a new one that is removed. Decoding and
the cache read are numpy's and count no operations. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from twinspect.bundle import Fitted, load
from twinspect.device import peak_mb
from twinspect.errors import DataError
from twinspect.training.derived import read_square
from twinspect.training.loop import StableAdamW, autocast, make_optimiser
from twinspect.training.source import FeatureSource, observe, teacher_batch
from twinspect.types import TRAIN, Sample

_FEWEST_STEPS, _MOST_STEPS = 3, 200
_MATRIX_SIDE, _COPIED_VALUES, _TRIES = 1024, 16_000_000, 5
_PAINTED_SIDE = 1000


@dataclass(frozen=True, slots=True)
class PartTime:
    """One part of a step.

    Attributes:
        seconds: measured, median over the steps.
        gflop: arithmetic, in 10^9 operations.
        gigabytes: read and written by its operations.
        bound_s: least seconds, the larger of both at the measured rates.
        bound_by: ``arithmetic``, ``bytes``, or empty where nothing of the part is torch's (decoding).
    """

    seconds: float
    gflop: float
    gigabytes: float
    bound_s: float
    bound_by: str


@dataclass(frozen=True, slots=True)
class TrainProfile:
    """What was measured; seconds are of one step of ``batch`` images.

    Attributes:
        parts: by name: decode and teacher (paid by every step without a cache, once an image with one), read
            (from a warm cache), one forward and backward a student, rest (scaling and losses), optimiser.
        cold_s, warm_s: a step that decodes and asks the teacher, and one that reads the cache.
        gflop_per_s, gigabytes_per_s: rates of a matrix product and of a copy here.
        peak_memory_mb: of the whole process, None where the system does not say.
    """

    model: str
    size: int
    batch: int
    precision: str
    steps: int
    parts: dict[str, PartTime]
    cold_s: float
    warm_s: float
    gflop_per_s: float
    gigabytes_per_s: float
    peak_memory_mb: float | None

    def lines(self) -> Iterator[str]:
        """A table for people."""
        yield f"{self.model}: steps of {self.batch} images at {self.size} px, {self.precision}, {self.steps} measured"
        yield f"here: {self.gflop_per_s:.0f} GFLOP/s (matrix product), {self.gigabytes_per_s:.1f} GB/s (copy)"
        yield "part                 measured ms   bound ms   of it   bound by     GFLOP       GB"
        for name, one in self.parts.items():
            share = one.bound_s / one.seconds if one.seconds else 0.0
            yield (
                f"{name:20s} {1e3 * one.seconds:11.1f} {1e3 * one.bound_s:10.1f} {100 * share:5.0f} %   "
                f"{one.bound_by:10s} {one.gflop:7.2f} {one.gigabytes:8.3f}"
            )
        yield (
            f"step without cache {1e3 * self.cold_s:.0f} ms, with a warm cache {1e3 * self.warm_s:.0f} ms: "
            f"{self.cold_s / self.warm_s:.1f} times faster"
        )
        if self.peak_memory_mb is not None:
            yield f"peak memory of the process: {self.peak_memory_mb:.0f} MB"


def main() -> None:
    """Measure, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="trained model (.twin)")
    parser.add_argument("--batch", type=int, default=16, help="images a step")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of torch; 0 is its own choice")
    parser.add_argument("--images", type=Path, help="images to decode; painted JPEGs without")
    parser.add_argument("--seconds", type=float, default=10.0, help="spent on steps")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    found = profile(given.bundle, given.images, given.batch, given.seconds)
    for line in found.lines():
        print(line)
    print(json.dumps(asdict(found)))


def profile(bundle: Path, images: Path | None, batch: int, seconds: float) -> TrainProfile:
    """Measure steps of ``batch`` images of training a bundle's model on, for so many seconds."""
    fitted = load(bundle)
    with tempfile.TemporaryDirectory() as folder:
        samples = _samples(images, batch, Path(folder))
        return _Profile(fitted, samples, Path(folder) / "cache", batch).measured(bundle.name, seconds)


class _Profile:
    """One model, a few images, and what their steps cost."""

    def __init__(self, fitted: Fitted, samples: Sequence[Sample], cache: Path, batch: int) -> None:
        self.model, self.config, self.batch = fitted.model, fitted.config.train, batch
        self.samples, self.cache = list(samples), cache
        self.optimiser: StableAdamW = make_optimiser(self.model, self.config)
        self.spent: dict[str, list[float]] = defaultdict(list)
        self.work: dict[str, tuple[float, float]] = {}

    def measured(self, name: str, seconds: float) -> TrainProfile:
        """Fill a cache, then take steps for as long as asked."""
        flops, rate = _matrix_rate(), _copy_rate()
        source = FeatureSource(self.model, self.samples, self.cache, lambda _stage, _done, _total: None)
        if source.skipped:
            raise DataError(f"{source.skipped[0].path}: {source.skipped[0].reason}")
        self.model.student.train()
        self._step(source, counted=False)  # warms up, and makes the optimiser's state
        self.spent.clear()
        self._step(source, counted=True)
        began, steps = time.perf_counter(), 0
        while steps < _FEWEST_STEPS or (time.perf_counter() - began < seconds and steps < _MOST_STEPS):
            self._step(source, counted=False)
            steps += 1
        parts = {part: self._part(part, flops, rate) for part in self.spent}
        cold = sum(one.seconds for part, one in parts.items() if part != "read")
        warm = sum(one.seconds for part, one in parts.items() if part not in ("decode", "teacher"))
        return TrainProfile(
            name, self.model.size, self.batch, self.config.precision, steps, parts, cold, warm,
            flops / 1e9, rate / 1e9, peak_mb(),
        )  # fmt: skip

    def _part(self, name: str, flops: float, rate: float) -> PartTime:
        arithmetic, moved = self.work[name]
        bounds = {"arithmetic": arithmetic / flops, "bytes": moved / rate}
        by = max(bounds, key=lambda key: bounds[key])
        return PartTime(
            float(np.median(self.spent[name])), arithmetic / 1e9, moved / 1e9, bounds[by], by if bounds[by] else ""
        )

    def _step(self, source: FeatureSource, counted: bool) -> None:
        """One step, part by part; ``counted`` counts operations and bytes instead of seconds."""
        measure = partial(self._metered, counted=counted)
        at = list(range(self.batch))
        squares = measure(
            "decode",
            call=lambda: torch.from_numpy(np.stack([read_square(s, self.model.size) for s in self.samples])),
        )
        parts = squares.split(teacher_batch(self.model))  # as the pass that fills the cache shows them
        measure("teacher", call=lambda: [observe(self.model, part) for part in parts])
        observed, small = measure("read", call=lambda: next(source.ahead([at])))
        terms = self._forward(observed, small, counted)
        for name, child in self.model.student.named_children():
            weights = [p for p in child.parameters() if p.requires_grad]
            if weights:
                # Asked for one student's gradients only, autograd leaves the other's part of the graph alone.
                back = partial(torch.autograd.backward, terms["loss"], retain_graph=True, inputs=weights)
                measure(f"{name} backward", call=back)
        measure("optimiser", call=self.optimiser.step)
        self.optimiser.zero_grad(set_to_none=True)

    def _forward(self, observed: Any, small: Tensor, counted: bool) -> dict[str, Tensor]:
        """The losses, their time cut into students and the rest."""
        meter, marks = _Meter(counted), defaultdict[str, list[tuple[float, ...]]](list)
        children = self.model.student.named_children()
        hooks = [hook for name, child in children for hook in _watch(child, meter, marks[name])]
        with autocast(self.config.precision, self.model.device), meter:
            terms = self.model.losses(observed, small, self.config.easy_ramp, self.config)
        for hook in hooks:
            hook.remove()
        found = {f"{name} forward": _apart(*pair) for name, pair in marks.items() if len(pair) == 2}
        for value in found.values():
            meter.spent = _apart(value, meter.spent)
        for name, value in {**found, "rest": meter.spent}.items():
            self._keep(name, value, counted)
        return terms

    def _metered(self, name: str, counted: bool, call: Callable[[], Any]) -> Any:
        with _Meter(counted) as meter:
            found = call()
        self._keep(name, meter.spent, counted)
        return found

    def _keep(self, name: str, value: tuple[float, ...], counted: bool) -> None:
        if counted:
            self.work[name] = (value[0], value[1])
        else:
            self.spent[name].append(value[0])


class _Meter:
    """A context that measures (seconds,), or counts (operations, bytes); ``spent`` holds the result."""

    def __init__(self, counted: bool) -> None:
        # Counters cannot be entered twice, so parts within a context are told apart by differences of `now`.
        own: dict[Any, Any] = {torch.ops.aten.convolution_backward: _convolution_backward}
        if hasattr(torch.ops.mkldnn, "_convolution_pointwise"):  # a teacher's on x86: see `models.fold`
            own[torch.ops.mkldnn._convolution_pointwise] = _convolution
        self._counters = (FlopCounterMode(display=False, custom_mapping=own), _Bytes()) if counted else None
        self.spent: tuple[float, ...] = ()
        self._began: tuple[float, ...] = ()

    def __enter__(self) -> _Meter:
        for counter in self._counters or ():
            counter.__enter__()  # type: ignore[no-untyped-call]
        self._began = self.now()
        return self

    def __exit__(self, *problem: Any) -> None:
        self.spent = _apart(self._began, self.now())
        for counter in reversed(self._counters or ()):
            counter.__exit__(*problem)  # type: ignore[no-untyped-call]

    def now(self) -> tuple[float, ...]:
        """The clock, or the counts so far."""
        if self._counters is None:
            return (time.perf_counter(),)
        flops, moved = self._counters
        return float(flops.get_total_flops()), float(moved.moved)


def _convolution(_x: Any, weight_DCkk: Sequence[int], *_: Any, out_shape: Sequence[int]) -> int:
    """Operations by the shapes of weights and output."""
    return 2 * math.prod(out_shape) * math.prod(weight_DCkk[1:])


def _convolution_backward(out_BDhw: Sequence[int], _x: Any, weight_DCkk: Sequence[int], *rest: Any, **_: Any) -> int:
    """Operations by shapes: a forward pass for each gradient asked for. Torch's own count forgets groups, which
    makes a depthwise convolution a hundred times dearer than it is.
    """
    of_input, of_weight = rest[7][:2]
    return 2 * math.prod(out_BDhw) * math.prod(weight_DCkk[1:]) * (int(of_input) + int(of_weight))


def _apart(first: tuple[float, ...], then: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(b - a for a, b in zip(first, then, strict=True))


class _Bytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes that operations read and write, each on its own; views move nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        read = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        written = [one for one in tree_leaves(found) if isinstance(one, Tensor)]
        memory = {one.untyped_storage().data_ptr() for one in read}
        if not all(one.untyped_storage().data_ptr() in memory for one in written) or func._schema.is_mutable:
            self.moved += sum(one.numel() * one.element_size() for one in (*read, *written))
        return found


def _watch(module: torch.nn.Module, meter: _Meter, marks: list[tuple[float, ...]]) -> list[Any]:
    """Hooks that note the meter before and after the module's forward."""

    def note(*_: Any) -> None:
        marks.append(meter.now())

    return [module.register_forward_pre_hook(note), module.register_forward_hook(note)]


def _matrix_rate() -> float:
    """Operations a second of a product of two square matrices in fp32, the best of a few."""
    one = torch.randn(_MATRIX_SIDE, _MATRIX_SIDE)
    return 2.0 * _MATRIX_SIDE**3 / min(_seconds(lambda: one @ one) for _ in range(_TRIES))


def _copy_rate() -> float:
    """Bytes a second, read and written, of a copy larger than any cache."""
    source, target = torch.ones(_COPIED_VALUES), torch.zeros(_COPIED_VALUES)
    return 8.0 * _COPIED_VALUES / min(_seconds(lambda: target.copy_(source)) for _ in range(_TRIES))


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _samples(images: Path | None, count: int, folder: Path) -> list[Sample]:
    """One batch of images: given ones, repeated where there are too few, or painted ones."""
    from twinspect.inference.decode import expand

    if images is not None:
        found = [Path(item.path) for item in islice(expand(images), count)]
        return [Sample(found[i % len(found)], TRAIN, "") for i in range(count)]
    from twinspect.data.images import made_up_rgb

    rng = np.random.default_rng(0)
    paths = [folder / f"{number}.jpg" for number in range(count)]
    for path in paths:
        Image.fromarray(made_up_rgb(rng, _PAINTED_SIDE)).save(path, quality=90)
    return [Sample(path, TRAIN, "") for path in paths]


if __name__ == "__main__":
    main()
