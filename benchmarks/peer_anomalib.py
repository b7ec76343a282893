"""One of anomalib's methods on the files of a job that `peers.py` wrote; runs with anomalib's own Python.

Needs anomalib, torch, numpy, Pillow and safetensors, and nothing of this library. Last line: JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

BATCH = 8


def built(job: dict[str, Any], method: str) -> Any:
    """The untrained method on the job's teacher."""
    from anomalib.models.image.padim.torch_model import PadimModel
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    torch.manual_seed(job["seed"])
    if method == "padim":
        model = PadimModel(
            job["arch"], list(job["padim_layers"]), pre_trained=False, n_features=job["padim_features"]
        )
    else:
        model = PatchcoreModel(job["patchcore_layers"], job["arch"], pre_trained=False, num_neighbors=9)
    net = model.feature_extractor.feature_extractor
    missing = net.load_state_dict(load_file(job["weights"]), strict=False).missing_keys
    if missing:
        raise SystemExit(f"the teacher's weights do not fit {job['arch']} in anomalib: {missing[:3]} missing")
    return model


def batches(job: dict[str, Any], files: list[str], size: int) -> Iterator[torch.Tensor]:
    """Normalised images, a few at a time."""
    mean, std = (torch.tensor(job[name]).view(3, 1, 1) for name in ("mean", "std"))
    for start in range(0, len(files), size):
        squares = [np.asarray(Image.open(path).convert("RGB")) for path in files[start : start + size]]
        pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 255.0
        yield (pixels - mean) / std


def fitted(job: dict[str, Any], method: str, model: Any) -> None:
    """Learn from the training files."""
    model.train()
    for images in batches(job, job["train"], BATCH):
        model(images)
    if method == "padim":
        model.fit()
        return
    bank = torch.vstack(model.embedding_store)
    chosen = torch.randperm(len(bank))[: job["patches"]]
    model.embedding_store = [bank[chosen]]
    model.subsample_embedding(job["coreset"])


def main() -> None:
    """``peer_anomalib.py JOB.json METHOD OUT.npz``."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    method, out = sys.argv[2], sys.argv[3]
    torch.set_num_threads(job["threads"])
    model = built(job, method)
    began = time.perf_counter()
    with torch.no_grad():
        fitted(job, method, model)
        fit_s = time.perf_counter() - began
        model.eval()
        scores, maps, began = [], [], 0.0
        for number, images in enumerate(batches(job, job["test"][:1] + job["test"], 1)):
            if number == 1:  # the first image warms up
                scores, maps, began = [], [], time.perf_counter()
            found = model(images)
            scores.append(float(found.pred_score))
            maps.append(found.anomaly_map.reshape(found.anomaly_map.shape[-2:]).half().numpy())
    seconds = time.perf_counter() - began
    np.savez(out, scores=np.array(scores), maps=np.stack(maps))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(json.dumps({"fit_s": fit_s, "images_per_s": len(scores) / seconds, "peak_memory_mb": peak}))


if __name__ == "__main__":
    main()
