"""Ours beside anomalib's: same images, same teacher, same machine, same run.

    python benchmarks/peers.py DATA --peer-python PYTHON [--classes fabric,pcb] [--limit 60] [--out FOLDER]

DATA is a data set of any layout that `twinspect fit` reads; PYTHON is that of an environment with anomalib. One model
a method for all classes. Images are resized once and written as files; every method reads those, in a process of its
own, one after the other. Fit time starts with the first file and ends with a model that can predict, images a second
are from file to score and map, one at a time, memory is the peak of the process. Scores are raw. PatchCore's coreset
is taken from random patches (`--patches`), as its full bank of all classes does not fit into small machines.

A Markdown table goes to FOLDER/peers.md, everything to FOLDER/peers.json; the last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from twinspect.config import RunConfig
from twinspect.data import load
from twinspect.data.samples import has_pixel_truth, read_sample_mask
from twinspect.device import peak_mb
from twinspect.metrics import auroc
from twinspect.training.derived import read_square
from twinspect.types import TEST, TRAIN, Sample

PEER = Path(__file__).with_name("peer_anomalib.py")
METHODS = ("padim", "patchcore")


def chosen(given: argparse.Namespace) -> list[Sample]:
    """Good training images and test images of the classes asked for, at most ``--limit`` of each kind a class."""
    samples = load(given.data).samples
    names = given.classes.split(",") if given.classes else sorted({s.class_name for s in samples})
    found: list[Sample] = []
    for name in names:
        own = [s for s in samples if s.class_name == name]
        kinds = [
            [s for s in own if s.split == TRAIN and s.label != 1],
            *[[s for s in own if s.split == TEST and s.label == label] for label in (0, 1)],
        ]
        if not all(kinds):
            raise SystemExit(f"class {name}: needs good training images and test images of both labels")
        for kind in kinds:
            count = min(given.limit or len(kind), len(kind))
            found += [kind[i * len(kind) // count] for i in range(count)]
    return found


def as_files(samples: Sequence[Sample], size: int, folder: Path) -> list[Sample]:
    """The samples with square files of the model's size in place of their images."""
    folder.mkdir()
    squares = []
    for number, sample in enumerate(samples):
        path = folder / f"{number:06d}.png"
        Image.fromarray(read_square(sample, size)).save(path, compress_level=1)
        squares.append(replace(sample, image=path, record=None))
    return squares


def job_of(given: argparse.Namespace, squares: Sequence[Sample], folder: Path) -> Path:
    """What the other side needs: files, and the teacher's weights as the library that made them names them."""
    from safetensors.torch import save_file

    from twinspect.models.teachers import Teacher
    from twinspect.models.weights import SHORT_NAMES, find_weights, load_state

    teacher = Teacher(given.teacher, SHORT_NAMES.get(given.teacher, given.teacher))
    load_state(teacher.net, find_weights(given.teacher, given.weights)[0], given.teacher)
    save_file({k: v.contiguous() for k, v in teacher.net.state_dict().items()}, folder / "teacher.safetensors")
    job = {
        "arch": teacher.info.arch,
        "mean": teacher.info.mean,
        "std": teacher.info.std,
        "weights": str(folder / "teacher.safetensors"),
        "train": [str(s.image) for s in squares if s.split == TRAIN],
        "test": [str(s.image) for s in squares if s.split == TEST],
        "padim_layers": [1, 2, 3],
        "padim_features": 100,
        "patchcore_layers": [2, 3],
        "patches": given.patches,
        "coreset": given.coreset,
        "threads": given.threads,
        "seed": given.seed,
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    return path


def ours(given: argparse.Namespace) -> None:
    """The other end of ``--run-ours``: fit and predict in a process of its own."""
    import torch

    from twinspect.inference.predictor import Predictor, TorchRuntime
    from twinspect.training.fit import fit

    torch.set_num_threads(given.threads)
    folder = Path(given.run_ours)
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    classes = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
    training = [Sample(Path(f), TRAIN, name) for f, name in zip(job["train"], classes, strict=True)]
    model = {"teacher": given.teacher, "size": given.size, "weights": str(given.weights or "")}
    train = {"steps": given.steps, "seed": given.seed} if given.steps else {"seed": given.seed}
    began = time.perf_counter()
    found = fit(training, RunConfig.from_dict({"model": model, "train": train}))
    fit_s = time.perf_counter() - began
    predictor = Predictor(TorchRuntime(found.model), found.decision, batch=1, workers=1)
    list(predictor.predict(job["test"][:1]))
    began = time.perf_counter()
    results = list(predictor.predict(job["test"]))
    seconds = time.perf_counter() - began
    maps = [np.asarray(Image.fromarray(one.map).resize((given.size, given.size), 2), np.float16) for one in results]
    np.savez(folder / "ours.npz", scores=np.array([one.score for one in results]), maps=np.stack(maps))
    row = {"fit_s": fit_s, "images_per_s": len(results) / seconds, "peak_memory_mb": peak_mb()}
    print(json.dumps(row))


def run(words: Sequence[object], home: Path) -> dict[str, Any]:
    """The last line of another process."""
    environment = {**os.environ, "TWINSPECT_HOME": str(home)}  # an empty cache: nothing was computed before
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(str(w) for w in words[:3])} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def judged(path: Path, test: Sequence[Sample], size: int) -> dict[str, Any]:
    """Image AUROC by class and, where there are masks, pixel AUROC at the model's size."""
    with np.load(path) as held:
        scores, maps = held["scores"], held["maps"]
    image, pixel = {}, {}
    for name in sorted({s.class_name for s in test}):
        at = [i for i, s in enumerate(test) if s.class_name == name]
        image[name] = auroc(scores[at], [test[i].label or 0 for i in at])
        with_truth = [i for i in at if has_pixel_truth(test[i])]
        if any(test[i].label == 1 for i in with_truth):
            truth = np.stack([_mask(test[i], size) for i in with_truth])
            pixel[name] = auroc(maps[with_truth].astype(np.float64).ravel(), truth.astype(int).ravel())
    means = {
        "image": float(np.mean(list(image.values()))),
        "pixel": float(np.mean(list(pixel.values())) if pixel else 0),
    }
    return {"image_auroc": image, "pixel_auroc": pixel, "mean_image_auroc": means["image"],
            "mean_pixel_auroc": means["pixel"] if pixel else None}  # fmt: skip


def _mask(sample: Sample, size: int) -> np.ndarray:
    if sample.label != 1:
        return np.zeros((size, size), bool)
    with Image.open(sample.masks[0]) as file:
        shape = (file.height, file.width)
    mask = Image.fromarray(read_sample_mask(sample, shape))
    return np.asarray(mask.resize((size, size), Image.Resampling.NEAREST))


def table(rows: dict[str, dict[str, Any]], said: str) -> str:
    """Markdown."""
    lines = [
        said,
        "",
        "| | fit s | images/s | peak MB | image AUROC | pixel AUROC |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        pixel = "" if row["mean_pixel_auroc"] is None else f"{row['mean_pixel_auroc']:.4f}"
        lines.append(
            f"| {name} | {row['fit_s']:.1f} | {row['images_per_s']:.2f} | {row['peak_memory_mb']:.0f} | "
            f"{row['mean_image_auroc']:.4f} | {pixel} |"
        )
    return "\n".join(lines) + "\n"


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument(
        "--peer-python", default="", help="Python of an environment with anomalib; without: ours only"
    )
    parser.add_argument("--classes", default="", help="separated by commas; all without")
    parser.add_argument("--limit", type=int, default=0, help="most images of a kind a class; 0: all")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--teacher", default="efficientnet-lite0")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=0, help="of ours; 0: its default")
    parser.add_argument("--patches", type=int, default=120_000, help="PatchCore's coreset is taken from so many")
    parser.add_argument("--coreset", type=float, default=0.03)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("peers"))
    parser.add_argument("--run-ours", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run every method, then judge all by the same code."""
    given = parsed()
    if given.run_ours:
        ours(given)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        squares = as_files(chosen(given), given.size, folder / "images")
        job = job_of(given, squares, folder)
        names = [s.class_name for s in squares if s.split == TRAIN]
        (folder / "classes.json").write_text(json.dumps(names), encoding="utf-8")
        test = [s for s in squares if s.split == TEST]
        options = [
            "--teacher",
            given.teacher,
            "--size",
            given.size,
            "--steps",
            given.steps,
            "--threads",
            given.threads,
        ]
        options += ["--seed", given.seed, *(["--weights", given.weights] if given.weights else [])]
        rows = {"ours": run([sys.executable, __file__, "--run-ours", folder, *options], folder)}
        for method in given.methods.split(",") if given.peer_python else ():
            rows[method] = run([given.peer_python, PEER, job, method, folder / f"{method}.npz"], folder)
        for name in rows:
            rows[name] |= judged(folder / f"{name}.npz", test, given.size)
    load_now = f"{os.getloadavg()[0]:.1f} of {os.cpu_count()} cores"
    said = f"{len(names)} training and {len(test)} test images at {given.size} px, {given.teacher}, load {load_now}"
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "peers.md").write_text(table(rows, said), encoding="utf-8")
    report = {"data": given.data.name, "settings": said, "rows": rows}
    (given.out / "peers.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(rows, said))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
