"""Everything about a CUDA GPU in one command: ``PYTHONPATH=src python benchmarks/gpu.py``.

Training first (`gpu_train`): 500 steps in bf16, and the time of a step beside its arithmetic bound. Then inference by
what users run, `TorchRuntime`. Needs torch >= 2.10 and what twinspect needs; weights are random, images painted, and
the statistics are learnt from some of them. For ViT-S/B/L at 224, 392 and 448 pixels, in fp32, tf32 and under bf16
autocast: images per second of the bare teacher, of A (teacher, both students, scorer) and of the Encoder-Decoder
alone; and how far the scores of images that the statistics have not seen lie from those in fp32. Prints a table for
people; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import gpu_train
import torch

from twinspect.config import ModelConfig, RunConfig, TrainConfig
from twinspect.device import choose_device, gpu_arithmetic
from twinspect.training.fit import fit

TEACHERS = {
    "vit-s": "vit_small_patch14_reg4_dinov2",
    "vit-b": "vit_base_patch14_reg4_dinov2",
    "vit-l": "vit_large_patch14_reg4_dinov2",
}
PRECISIONS = ("fp32", "tf32", "bf16")
_LEARNT, _UNSEEN = 32, 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="vit-s,vit-b,vit-l")
    parser.add_argument("--sizes", default="224,392,448")
    parser.add_argument("--images", type=int, default=32, help="of a call, in inference")
    parser.add_argument("--seconds", type=float, default=1.0, help="spent on each timing")
    parser.add_argument("--only", choices=("training", "inference"), help="one half of it")
    gpu_train.options(parser.add_argument_group("training"))
    given = parser.parse_args()
    if choose_device(given.device) == "cpu" and given.device != "cpu":
        print("no CUDA device here: nothing to measure (--device cpu only shows that this runs)")
        print(json.dumps({"device": None, "training": None, "rows": []}))
        return 0
    training = gpu_train.measure(given) if given.only != "inference" else None
    device, rows = torch.device(choose_device(given.device)), []
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {given.images} images a call")
    print("model  size  precision   teacher      A   ED only   time of A / teacher   gap to fp32: largest, mean")
    for model in given.models.split(",") if given.only != "training" else ():
        for size in map(int, given.sizes.split(",")):
            for row in measure(given, TEACHERS.get(model, model), size, device):
                rows.append({"model": model, "size": size, **row})
                print(line_of(rows[-1]), flush=True)
    versions = {"device": name, "torch": torch.__version__, "images": given.images}
    print(json.dumps({**versions, "training": training, "rows": rows}))
    return 0


def measure(given: argparse.Namespace, arch: str, size: int, device: torch.device) -> list[dict[str, Any]]:
    """A row a precision: images per second, and distance of the scores from those in fp32."""
    model, unseen = fitted(arch, size, device)
    image = unseen.repeat(-(-given.images // len(unseen)), 1, 1, 1)[: given.images]
    rows, exact = [], torch.empty(0)
    for precision in PRECISIONS:
        with torch.inference_mode(), arithmetic(precision, device):
            score = model(unseen).score_B.float()
            exact = score if precision == "fp32" else exact
            gap = (score - exact).abs() / exact.abs().clamp_min(1.0)
            row: dict[str, Any] = {key: speed(step, image, given.seconds) for key, step in steps(model).items()}
        row |= {"precision": precision, "ratio": row["teacher"] / row["a"]}  # of times
        rows.append(row | {"gap_largest": float(gap.max()), "gap_mean": float(gap.mean())})
    return rows


def fitted(arch: str, size: int, device: torch.device) -> tuple[Any, torch.Tensor]:
    """A model with random weights and statistics of painted images; and images that it has not seen."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TWINSPECT_HOME"] = folder
        samples = gpu_train.painted(Path(folder), _LEARNT + _UNSEEN, size)
        config = RunConfig(
            ModelConfig(teacher=arch, pretrained=False, size=size), TrainConfig(steps=0, device=str(device))
        )
        model = fit(samples[:_LEARNT], config, None).model.eval().to(device)
        pixels = [torch.from_numpy(gpu_train.pixels_of(sample)) for sample in samples[_LEARNT:]]
    return model, torch.stack(pixels).permute(0, 3, 1, 2).contiguous().to(device)


def arithmetic(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """How products are computed while it is entered."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return gpu_arithmetic(device.type, precision)


def steps(model: Any) -> dict[str, Callable[[torch.Tensor], Any]]:
    """Bare teacher, whole model, teacher with the Encoder-Decoder only."""

    def teacher(image: torch.Tensor) -> Any:
        return model.teacher.features(model.teacher.normalise(image))

    def local(image: torch.Tensor) -> Any:
        groups, trunk = model.groups(model.observe(model.teacher.normalise(image)))
        return groups, model.student.local(trunk)

    return {"teacher": teacher, "a": model, "ed": local}


def speed(step: Callable[[torch.Tensor], Any], image: torch.Tensor, seconds: float) -> float:
    """Images per second after a warm-up."""
    for _ in range(3):
        step(image)
    gpu_train.wait(image.device)
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(5):
            step(image)
        gpu_train.wait(image.device)
        calls += 5
    return calls * len(image) / (time.perf_counter() - began)


def line_of(row: dict[str, Any]) -> str:
    head = f"{row['model']:<6} {row['size']:4d}  {row['precision']:<9} {row['teacher']:9.0f} {row['a']:6.0f} "
    return head + f"{row['ed']:9.0f} {row['ratio']:21.2f}   {row['gap_largest']:.2g}, {row['gap_mean']:.2g}"


if __name__ == "__main__":
    sys.exit(main())
