"""Everything about a CUDA GPU in one command: ``PYTHONPATH=src python benchmarks/gpu.py``.

Training first (`gpu_train`): 500 steps in bf16, and the time of a step beside its arithmetic bound. Then speed and
bf16 parity of inference. Needs torch >= 2.10 and timm only; weights are random. For ViT-S/B/L at 224, 392 and 448
pixels: images per second of the bare teacher, of A (teacher, both students, scorer) and of the Encoder-Decoder alone,
in bf16, eager and, at ``--compile-sizes``, compiled; and how far bf16 scores are from fp32. Prints a table for
people; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import gpu_train
import torch

from twinspect.config import ModelConfig
from twinspect.device import choose_device
from twinspect.models.contract import build_model

Step = Callable[[torch.Tensor], Any]
TEACHERS = {
    "vit-s": "vit_small_patch14_reg4_dinov2",
    "vit-b": "vit_base_patch14_reg4_dinov2",
    "vit-l": "vit_large_patch14_reg4_dinov2",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="vit-s,vit-b,vit-l")
    parser.add_argument("--sizes", default="224,392,448")
    parser.add_argument("--images", type=int, default=32, help="of a call, in inference")
    parser.add_argument("--seconds", type=float, default=2.0, help="spent on each timing")
    parser.add_argument("--compile-sizes", default="392", help="at which inference is timed compiled too")
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
    print(f"{name}, torch {torch.__version__}, {given.images} images a call, bf16")
    print("model  size  compiled   teacher      A   ED only   time of A / teacher   largest score gap of bf16")
    for model in given.models.split(",") if given.only != "training" else ():
        for size in map(int, given.sizes.split(",")):
            for compiled in (False, True)[: 2 if str(size) in given.compile_sizes.split(",") else 1]:
                rows.append(
                    {
                        "model": model,
                        "size": size,
                        "compiled": compiled,
                        **measure(given, model, size, device, compiled),
                    }
                )
                print(line_of(rows[-1]), flush=True)
    versions = {"device": name, "torch": torch.__version__, "images": given.images}
    print(json.dumps({**versions, "training": training, "rows": rows}))
    return 0


def measure(given: argparse.Namespace, name: str, size: int, device: torch.device, compiled: bool) -> dict[str, Any]:
    """Images per second of the three steps, or why they could not be measured."""
    try:
        model = build(TEACHERS.get(name, name), size).to(device)
        image = torch.randint(0, 256, (given.images, 3, size, size), dtype=torch.uint8, device=device)
        with torch.inference_mode():
            found: dict[str, Any] = {
                key: speed(prepared(step, compiled), image, given.seconds) for key, step in steps(model).items()
            }
            found["ratio"] = found["teacher"] / found["a"]  # of times
            found["bf16"] = parity(model, image[:8])
        return found
    except torch.OutOfMemoryError:
        return {"error": "out of memory; give fewer --images"}
    finally:
        torch._dynamo.reset()
        torch.cuda.empty_cache()  # does nothing without a GPU


def build(arch: str, size: int) -> Any:
    """The model with random weights."""
    torch.manual_seed(0)
    return build_model(ModelConfig(teacher=arch, pretrained=False, size=size)).eval()


def steps(model: Any) -> dict[str, Step]:
    """Bare teacher, whole model, teacher with the Encoder-Decoder only."""

    def teacher(image: torch.Tensor) -> Any:
        return model.teacher.features(model.teacher.normalise(image))

    def local(image: torch.Tensor) -> Any:
        groups, trunk = model.groups(model.observe(model.teacher.normalise(image)))
        return groups, model.student.local(trunk)

    return {"teacher": teacher, "a": model, "ed": local}


def prepared(step: Step, compiled: bool) -> Step:
    """Under bf16 autocast, compiled with CUDA graphs where asked."""
    inner = torch.compile(step, mode="reduce-overhead") if compiled else step

    def run(image: torch.Tensor) -> Any:
        with torch.autocast(image.device.type, torch.bfloat16):
            return inner(image)

    return run


def speed(step: Step, image: torch.Tensor, seconds: float) -> float:
    """Images per second after a warm-up."""
    for _ in range(5):
        step(image)
    gpu_train.wait(image.device)
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(5):
            step(image)
        gpu_train.wait(image.device)
        calls += 5
    return calls * len(image) / (time.perf_counter() - began)


def parity(model: Any, image: torch.Tensor) -> dict[str, float]:
    """Largest gap of bf16 to fp32, relative to max(1, |fp32|), of raw scores and of the map."""
    exact = model(image)
    with torch.autocast(image.device.type, torch.bfloat16):
        close = model(image)
    names = ("score_local_B", "score_semantic_B", "map_B1HW")
    pairs = {name: (getattr(exact, name).float(), getattr(close, name).float()) for name in names}
    return {name: float(((a - b).abs() / a.abs().clamp_min(1.0)).max()) for name, (a, b) in pairs.items()}


def line_of(row: dict[str, Any]) -> str:
    head = f"{row['model']:<6} {row['size']:4d}  {'yes' if row['compiled'] else 'no':<8}"
    if "error" in row:
        return f"{head} {row['error']}"
    gap = max(row["bf16"]["score_local_B"], row["bf16"]["score_semantic_B"])
    return f"{head} {row['teacher']:9.0f} {row['a']:6.0f} {row['ed']:9.0f} {row['ratio']:21.2f}   {gap:.2g}"


if __name__ == "__main__":
    sys.exit(main())
