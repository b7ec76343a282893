"""Speed and memory of the pixel metrics, and the same with anomalib on identical arrays.

    python benchmarks/metrics.py                                 1,725 maps of 256 x 256 with masks
    python benchmarks/metrics.py --anomalib-python /path/python  the same, next to anomalib's AUROC + AUPRO
    python benchmarks/metrics.py --count 114585                  test size of Real-IAD, with the memory curve
    python benchmarks/metrics.py --classes 15                    dealt to classes that share the memory limit

Every measurement runs in a process of its own, so that its peak memory is its own. Maps are made on the fly
from the seed (identical in every process); only the metric's ``update`` and ``compute`` are timed. Both sides
may use all cores; CPU time stands beside the clock because it says more on a shared machine. Memory is
resident memory above what the process held after imports, before the first map.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SIDE = 256
GRID = 28
ROWS = np.arange(SIDE)[:, None]
SETUP = """anomalib was not measured. To measure it on the same arrays, in an environment of its own:
    python3 -m venv /tmp/anomalib-env && /tmp/anomalib-env/bin/pip install anomalib
    python benchmarks/metrics.py --anomalib-python /tmp/anomalib-env/bin/python"""


def bilinear() -> np.ndarray:
    """256 x 28 matrix that upsamples one axis, as a model upsamples its patch grid."""
    at = np.clip((ROWS[:, 0] + 0.5) * GRID / SIDE - 0.5, 0, GRID - 1)
    left = np.minimum(at.astype(int), GRID - 2)
    out = np.zeros((SIDE, GRID), np.float32)
    out[np.arange(SIDE), left] = 1 - (at - left)
    out[np.arange(SIDE), left + 1] += at - left
    return out


UP = bilinear()


def make(seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Map and mask number N: smooth scores in (0, 1); two of three images have one to four defects."""
    rng = np.random.default_rng((seed, number))
    low = rng.random((GRID, GRID), dtype=np.float32) ** 3 * np.float32(0.6)
    mask = np.zeros((SIDE, SIDE), bool)
    for _ in range(rng.integers(1, 5) if number % 3 else 0):
        cy, cx = rng.integers(20, SIDE - 20, 2)
        ry, rx = rng.integers(3, 20, 2)
        mask |= ((ROWS - cy) / ry) ** 2 + ((ROWS.T - cx) / rx) ** 2 <= 1
    low += np.float32(0.3) * mask[4::9, 4::9][:GRID, :GRID] * rng.random((GRID, GRID), dtype=np.float32)
    return UP @ low @ UP.T, mask


def resident() -> int:
    """Bytes this process holds in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Ours:
    """twinspect: AUROC, AP, best F1, AUPRO at 0.3 and 0.05, per class."""

    def __init__(self, classes: int) -> None:
        from twinspect.metrics import Evaluator

        self.evaluator, self.classes = Evaluator(), classes

    def update(self, number: int, scores: np.ndarray, mask: np.ndarray) -> None:
        """Count one map."""
        label = int(mask.any())
        name = f"class {number % self.classes}"
        self.evaluator.update(float(scores.max()), label, name, map_HW=scores, mask_HW=mask)

    def compute(self) -> dict[str, float]:
        """Metrics of all maps."""
        out = self.evaluator.compute()
        bound = max(out["error_bound"].values(), default=0.0)
        values = {name: v for name, v in out["mean"].items() if name.startswith(("pixel", "aupro"))}
        return values | {"error_bound": bound, "bits_dropped": self.evaluator.budget.drop - 1}


class Anomalib:
    """anomalib: AUROC and AUPRO(0.3) of all maps, given in batches of 32 as its engine does."""

    def __init__(self, classes: int) -> None:
        import torch

        try:
            import torchvision  # noqa: F401
        except RuntimeError:  # a torchvision built for another torch; its operators are not needed here
            torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        from anomalib.metrics.aupro import _AUPRO
        from anomalib.metrics.auroc import _AUROC

        if classes != 1:
            raise SystemExit("the comparison is for --classes 1")
        self.torch, self.auroc, self.aupro = torch, _AUROC(), _AUPRO(fpr_limit=0.3)
        self.batch: list[tuple[np.ndarray, np.ndarray]] = []

    def update(self, number: int, scores: np.ndarray, mask: np.ndarray) -> None:
        """Count one map."""
        self.batch.append((scores, mask))
        if len(self.batch) == 32:
            self.flush()

    def flush(self) -> None:
        """Hand the batch over."""
        if self.batch:
            preds, target = (self.torch.from_numpy(np.stack(a)) for a in zip(*self.batch, strict=True))
            self.auroc.update(preds, target.int())
            self.aupro.update(preds, target.int())
        self.batch = []

    def compute(self) -> dict[str, float]:
        """Metrics of all maps."""
        self.flush()
        return {"pixel_auroc": float(self.auroc.compute()), "aupro": float(self.aupro.compute())}


def measure(which: str, count: int, seed: int, classes: int) -> dict[str, object]:
    meter = {"twinspect": Ours, "anomalib": Anomalib}[which](classes)
    make(seed, 0)
    base, spent, cpu, curve, step = resident(), 0.0, 0.0, [], max(1, count // 10)
    for number in range(count):
        scores, mask = make(seed, number)
        start, start_cpu = time.perf_counter(), time.process_time()
        meter.update(number, scores, mask)
        spent += time.perf_counter() - start
        cpu += time.process_time() - start_cpu
        if (number + 1) % step == 0:
            curve.append(round((resident() - base) / 2**20))
            print(f"  {which}: {number + 1:>7} maps, {curve[-1]:>6} MiB, {spent:8.1f} s", flush=True)
    start, start_cpu = time.perf_counter(), time.process_time()
    values = meter.compute()
    last = time.perf_counter() - start
    cpu += time.process_time() - start_cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - base
    return {
        "library": which,
        "maps": count,
        "classes": classes,
        "seconds": round(spent + last, 2),
        "cpu_seconds": round(cpu, 2),
        "compute_seconds": round(last, 2),
        "ms_per_map": round(spent / count * 1e3, 3),
        "peak_mib": round(peak / 2**20),
        "curve_mib": curve,
        "values": values,
    }


def in_process(python: str, which: str, args: argparse.Namespace) -> dict[str, object]:
    """Run one measurement in a fresh interpreter, passing its progress on; its last line is the result."""
    command = [python, __file__, "--worker", which, "--count", str(args.count), "--seed", str(args.seed)]
    command += ["--classes", str(args.classes)]
    # The generator's matrix product must not leave numpy's BLAS threads spinning into the timed part.
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    line = ""
    for line in process.stdout or ():
        if not line.startswith("{"):
            print(line, end="", flush=True)
    if process.wait() or not line.startswith("{"):
        raise SystemExit(f"measurement of {which} failed (exit {process.returncode})")
    return json.loads(line)


def show(result: dict[str, object]) -> None:
    print(
        f"{result['library']}: {result['seconds']} s ({result['ms_per_map']} ms per map + "
        f"{result['compute_seconds']} s; CPU {result['cpu_seconds']} s), "
        f"peak {result['peak_mib']} MiB above start"
    )
    print("  " + ", ".join(f"{k} {v:.6g}" for k, v in result["values"].items()))


def compare(ours: dict[str, object], theirs: dict[str, object]) -> dict[str, float]:
    ratio = theirs["seconds"] / ours["seconds"]
    cpu = theirs["cpu_seconds"] / ours["cpu_seconds"]
    memory = theirs["peak_mib"] / ours["peak_mib"]
    print(f"speed: {ratio:.1f} x by the clock, {cpu:.1f} x in CPU time; memory: {memory:.1f} x less")
    for name, value in theirs["values"].items():
        print(f"  {name}: ours {ours['values'][name]:.6f}, anomalib {value:.6f}")
    return {"speed_ratio": round(ratio, 1), "cpu_ratio": round(cpu, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1725, help="number of maps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--classes", type=int, default=1, help="classes the maps are dealt to, one limit for all")
    parser.add_argument("--anomalib-python", help="interpreter of an environment that has anomalib")
    parser.add_argument("--worker", choices=("twinspect", "anomalib"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.worker, args.count, args.seed, args.classes)))
        return
    out = {"twinspect": in_process(sys.executable, "twinspect", args)}
    show(out["twinspect"])
    if args.anomalib_python:
        out["anomalib"] = in_process(args.anomalib_python, "anomalib", args)
        show(out["anomalib"])
        out |= compare(out["twinspect"], out["anomalib"])
    else:
        print(SETUP)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
