"""Training on a GPU, by the loop of ``twinspect fit``: is it stable in bf16, and how far from the arithmetic bound?

Run by `gpu.py`, or alone: ``PYTHONPATH=src python benchmarks/gpu_train.py``. Weights are random, images painted.

*stability*: ``fit`` itself, 500 steps of a ViT-B/14 at 448 px in bf16; all losses and weights must be finite, and the
loss must have fallen. *step*: 392 px, steps of 16 images, from a warm cache and without one, beside the least time
that the arithmetic (teacher forward, students forward and backward) takes at the rate of a large bf16 matrix product
measured in the same run; and the Encoder-Decoder alone, which is what Dinomaly trains. Step times are medians of the
differences of the log's own seconds, first steps left out. The last line is JSON.

``--dinomaly DIR`` (a checkout of guojiajeremy/Dinomaly that you bring) times a step of the public code beside it: the
same encoder, size and batch, images already on the GPU; in fp32, as its script runs, and under bf16 autocast.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from twinspect.config import ModelConfig, RunConfig, TrainConfig
from twinspect.data.images import made_up_rgb
from twinspect.device import choose_device
from twinspect.losses import easy_share, encoder_decoder_loss
from twinspect.models.contract import build_model
from twinspect.training.fit import fit
from twinspect.training.loop import autocast, make_optimiser, train
from twinspect.training.source import FeatureSource
from twinspect.types import TRAIN, Sample, silent

VIT_B = "vit_base_patch14_reg4_dinov2"
_SKIPPED = 5  # first steps: allocation, choice of kernels
_IMAGES = 64


def painted(folder: Path, count: int, side: int) -> list[Sample]:
    """Images as files."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{number:04d}.png" for number in range(count)]
    for path in paths:
        Image.fromarray(made_up_rgb(rng, side)).save(path, compress_level=1)
    return [Sample(path, TRAIN, "part") for path in paths]


def pixels_of(sample: Sample) -> NDArray[np.uint8]:
    """H x W x 3."""
    return np.array(Image.open(sample.image))


def stability(given: argparse.Namespace, device: str, folder: Path) -> dict[str, Any]:
    """``fit`` from end to end: are losses and weights finite, and does the loss fall?"""
    samples = painted(folder, _IMAGES, given.stable_size)
    config = RunConfig(
        ModelConfig(teacher=given.arch, pretrained=False, size=given.stable_size),
        TrainConfig(steps=given.steps, batch=given.batch, precision="bf16", device=device),
    )
    began = time.perf_counter()
    fitted = fit(samples, config, folder / "work")
    losses = [row["loss"] for row in rows(folder / "work")]
    tenth = max(1, len(losses) // 10)
    return {
        "steps": len(losses),
        "size": given.stable_size,
        "losses_finite": bool(np.isfinite(losses).all()),
        "weights_finite": all(bool(torch.isfinite(v).all()) for v in fitted.model.student.state_dict().values()),
        "loss_first_tenth": float(np.mean(losses[:tenth])),
        "loss_last_tenth": float(np.mean(losses[-tenth:])),
        "seconds": time.perf_counter() - began,
    }


def step_times(given: argparse.Namespace, device: str, folder: Path) -> dict[str, Any]:
    """Seconds of a step with and without a cache, of the Encoder-Decoder's alone, and their bounds."""
    torch.manual_seed(0)
    samples = painted(folder, _IMAGES, given.size)
    model = build_model(ModelConfig(teacher=given.arch, pretrained=False, size=given.size)).to(device)
    config = TrainConfig(steps=given.timed, batch=given.batch, precision="bf16", device=device)
    rate = matrix_rate(device, given.matrix)
    found: dict[str, Any] = {"size": given.size, "batch": given.batch, "tflop_per_s": rate / 1e12}
    for name, root in (("warm", folder / "cache"), ("cold", None)):
        source = FeatureSource(model, samples, root, silent)
        work = folder / name
        work.mkdir()
        train(model, source, range(len(samples)), config, work, silent, group=group_of(device))
        seconds = float(np.median(np.diff([row["seconds"] for row in rows(work)])[_SKIPPED:]))
        found[name] = judged(seconds, operations(model, source, config) / rate)
        if root is not None:
            found["decoder alone"] = decoder_alone(model, source, config, rate)
    if given.dinomaly is not None:
        found["public Dinomaly, s"] = public_dinomaly(given, device)
    return found


def decoder_alone(model: Any, source: FeatureSource, config: TrainConfig, rate: float) -> dict[str, float]:
    """The same step without the Encoder-Encoder, from memory: no reading, no decoding."""
    model.student.train()
    optimiser = make_optimiser(model, config)
    observed, _ = next(source.ahead([range(config.batch)]))

    def step() -> None:
        with autocast(config.precision, model.device):
            groups, trunk = model.groups(observed)
            share = easy_share(config.easy_ramp, config.easy_ramp)
            loss = encoder_decoder_loss(groups, model.student.local(trunk), share).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    with FlopCounterMode(display=False) as counter:
        step()
    return judged(timed(step, model.device, config.steps), counter.get_total_flops() / rate)


def public_dinomaly(given: argparse.Namespace, device: str) -> dict[str, float]:
    """Seconds of a step of Dinomaly's public code, by precision; the step is that of its training script."""
    from parity import LR, their_dinomaly

    from twinspect.models.teachers import Teacher

    torch.manual_seed(0)
    model, utils, optimizers = their_dinomaly(given.dinomaly, Teacher("public", given.arch), second=False)
    model = model.float().to(device).train()
    students = torch.nn.ModuleList([model.bottleneck, model.decoder])
    options = {"lr": LR, "betas": (0.9, 0.999), "weight_decay": 1e-4, "amsgrad": True, "eps": 1e-10}
    optimiser = optimizers.StableAdamW([{"params": students.parameters()}], **options)
    image = torch.randn(given.batch, 3, given.size, given.size, device=device)
    found = {}
    for precision in ("fp32", "bf16"):

        def step(precision: str = precision) -> None:
            with autocast(precision, image.device):
                targets, predicted = model(image)
                loss = utils.global_cosine_hm_percent(targets, predicted, p=0.9, factor=0.1)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(students.parameters(), max_norm=0.1)
            optimiser.step()

        found[precision] = timed(step, image.device, given.timed)
    return found


def operations(model: Any, source: FeatureSource, config: TrainConfig) -> float:
    """Operations of a step by shapes: teacher where the source asks it, students forward and backward."""
    model.student.train()
    with FlopCounterMode(display=False) as counter:
        observed, small = next(source.ahead([range(config.batch)]))
        with autocast(config.precision, model.device):
            loss = model.losses(observed, small, config.easy_ramp, config)["loss"]
        loss.backward()
    model.student.zero_grad()
    return float(counter.get_total_flops())


def matrix_rate(device: str, side: int) -> float:
    """Operations a second of a large product of bf16 matrices, the best of a few."""
    one = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    return 2.0 * side**3 / min(timed(lambda: one @ one, torch.device(device), 3) for _ in range(5))


def timed(call: Any, device: torch.device, times: int) -> float:
    """Seconds of a call, the mean of some after one that does not count."""
    call()
    wait(device)
    began = time.perf_counter()
    for _ in range(times):
        call()
    wait(device)
    return (time.perf_counter() - began) / times


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def judged(seconds: float, bound: float) -> dict[str, float]:
    return {"seconds": seconds, "bound_s": bound, "times_bound": seconds / bound}


def group_of(device: str) -> Any:
    from twinspect.training.distributed import Group

    return Group(device=torch.device(device))


def rows(work: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (work / "train.jsonl").read_text(encoding="utf-8").splitlines()]


def options(parser: argparse.ArgumentParser) -> None:
    """What `gpu.py` passes on."""
    parser.add_argument("--device", default="auto", help="cpu with a small --arch only shows that this runs")
    parser.add_argument("--arch", default=VIT_B, help="timm name of the teacher in training")
    parser.add_argument("--steps", type=int, default=500, help="of stability")
    parser.add_argument("--stable-size", type=int, default=448)
    parser.add_argument("--size", type=int, default=392, help="of timed steps")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--timed", type=int, default=40, help="timed steps")
    parser.add_argument("--dinomaly", type=Path, help="checkout of the public code, timed beside ours")
    parser.add_argument("--matrix", type=int, default=8192, help="side of the matrices whose product is the measure")


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Everything above, said as it is found."""
    device = choose_device(given.device)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TWINSPECT_HOME"] = folder  # an empty cache
        found: dict[str, Any] = {"device": device, "arch": given.arch}
        for name, what in (("stability", stability), ("step", step_times)):
            (Path(folder) / name).mkdir()
            found[name] = what(given, device, Path(folder) / name)
            print(name, json.dumps(found[name], indent=1), flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options(parser)
    print(json.dumps(measure(parser.parse_args())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
