"""A trained model as one file for another runtime, and the proof that both say the same.

The graph has raw pixels in and every field of `Outputs` out. It is written aside, run beside torch, and renamed when
it agrees.

Both runtimes see the same pixels. Gaps are relative to max(1, |reference|), for scores and for every value of the
maps alike. Nothing half-written stays under the name asked for: every step happens in a folder beside it that goes
away.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from twinspect.bundle import EXPORTS, Fitted, write_beside
from twinspect.data.images import made_up_rgb
from twinspect.decide.decision import Decision
from twinspect.errors import BundleError, ConfigError, DataError, OutputError, TwinspectError, required
from twinspect.files import lock, refuse_unwritable
from twinspect.inference.decode import Decoding, decode, expand
from twinspect.inference.predictor import RUNTIMES, Answers, Pixels, Runtime, TorchRuntime, load_runtime
from twinspect.models.contract import AnomalyModel, Outputs
from twinspect.models.fold import prepared
from twinspect.types import Progress, silent

_FEWEST, _MOST = 32, 100  # images that an export should be compared on, and is
_ROUNDING = 1e-4  # gap of two scores that are the same
TOLERANCES = {"scores": _ROUNDING, "map values": 1e-3}  # largest gaps
_NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
OPSET = 20
MOST_BYTES = 2**31 - 2**20  # protobuf's limit for one file, less room for the graph itself
_MOST_BATCH = 4096


class ParityError(TwinspectError):
    """An export does not say what the model says."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """An export beside its model."""

    images: int
    synthetic: bool  # whether they were painted; their answers are not compared, as all are anomalies
    score_gap: float  # the largest relative one
    map_gap: float
    changed: int  # images that got another answer from the export, by more than rounding of their scores

    def problems(self) -> list[str]:
        """Why an export is refused; empty when it is accepted."""
        problems = [self._answers()] if self.changed else []
        for (what, limit), gap in zip(TOLERANCES.items(), (self.score_gap, self.map_gap), strict=True):
            if not np.isfinite(gap):
                problems.append(f"{what} are not finite, or of another shape")
            elif gap > limit:
                problems.append(f"{what} differ by up to {gap:.2g} (accepted {limit:g})")
        return problems

    def lines(self) -> Iterator[str]:
        """What to say to people."""
        kind = "made-up images (give real ones with --images)" if self.synthetic else "images"
        yield (
            f"compared with torch on {self.images} {kind}: scores differ by up to {self.score_gap:.2g}, "
            f"map values by {self.map_gap:.2g}"
        )
        if not self.synthetic:
            yield self._answers()
            if self.images < _FEWEST:
                yield f"only {self.images} images were compared; {_FEWEST} or more say more"

    def _answers(self) -> str:
        if not self.changed:
            return f"the answers for all {self.images} images are the same"
        return f"the answers for {self.changed} of {self.images} images differ"


def export(fitted: Fitted, out: Path, images: Sequence[Pixels] = (), progress: Progress = silent) -> Comparison:
    """Write an export (``.onnx``, or ``.xml`` with ``.bin`` for OpenVINO), after it agreed with torch.

    ``images`` are those to compare on, of the model's size (`load_images`), 32 or more; without any some are painted.
    A TwinspectError for a model that cannot be exported, a package that is missing, an export that does not say what
    the model says (ParityError), or a file that cannot be written; nothing is left behind.
    """
    runtime = checked_runtime(out)
    refuse_unwritable(out, "--out")
    size = fitted.model.size
    try:
        with _drafts(out) as folder:
            draft = folder / out.name
            progress("exporting", 0, 1)
            write(to_onnx(fitted.model), draft)
            progress("exporting", 1, 1)
            reference, exported = TorchRuntime(fitted.model), RUNTIMES[out.suffix](draft, size)
            comparison = compare(reference, exported, images, fitted.decision, progress)
            if problems := "; ".join(comparison.problems()):
                raise ParityError(
                    f"the export does not say what the model says: {problems}. Nothing was written. Please report "
                    "this with the versions that twinspect doctor prints"
                )
            meta = {"runtime": runtime, "size": size, "check": asdict(comparison), "record": fitted.record}
            meta |= {"decision": fitted.decision.to_dict(), "config": fitted.config.to_dict()}
            write_beside(draft, meta)
            made = [part for part in folder.iterdir() if part.is_file()]
            for part in sorted(made, key=lambda p: p == draft):
                os.replace(part, out.with_name(part.name))
    except OSError as error:
        raise OutputError(f"{out} cannot be written ({error.strerror or error}); nothing was left behind") from None
    return comparison


def check(path: Path, fitted: Fitted, images: Sequence[Pixels]) -> tuple[Comparison, dict[str, Any]]:
    """Compare an export with its bundle; a BundleError where it is damaged, or of another bundle."""
    exported, meta = load_runtime(path)
    if meta["decision"].get("model_id") != fitted.decision.model_id:
        raise BundleError(
            f"{path} was exported from another model (id {meta['decision'].get('model_id')}, this bundle's is "
            f"{fitted.decision.model_id}); type: twinspect export MODEL --out {path.name}"
        )
    return compare(TorchRuntime(fitted.model), exported, images, fitted.decision, silent), meta


def checked_runtime(out: Path) -> str:
    """The runtime that a file's ending says, which is there to compare with. Raises as `export`."""
    runtime = EXPORTS.get(out.suffix, "")
    if not runtime:
        raise ConfigError(f"--out {out.name}: an export ends in .onnx, or in .xml for OpenVINO")
    for package in _NEEDED[runtime]:
        required(package, out.name, f"twinspect[{runtime}]")
    return runtime


@contextmanager
def _drafts(out: Path) -> Iterator[Path]:
    """A folder for what is not accepted yet; one that a killed export left is emptied first."""
    folder = out.with_name(f".{out.name}.export")
    folder.mkdir(exist_ok=True)
    with lock(folder / "lock", f"another export to {out} is at work; wait for it, or choose another --out"):
        drafts = folder / "drafts"
        shutil.rmtree(drafts, ignore_errors=True)
        drafts.mkdir()
        try:
            yield drafts
        finally:
            shutil.rmtree(folder, ignore_errors=True)


# --------------------------------------------------------------------------------------------- the graph


class DeployedGraph(nn.Module):
    """uint8 RGB B x S x S x 3 (channels last, as decoders give it) to the fields of `Outputs` by name."""

    def __init__(self, model: AnomalyModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, image_BHWC: Tensor) -> dict[str, Tensor]:
        """All outputs of the model."""
        return dict(self.model(image_BHWC.permute(0, 3, 1, 2))._asdict())


def to_onnx(model: AnomalyModel) -> Any:
    """The model as an ``onnx.ModelProto`` for any number of images; a ConfigError where it cannot be exported."""
    from onnxscript.optimizer import fold_constants

    example = torch.zeros(2, model.size, model.size, 3, dtype=torch.uint8)
    dims = {0: torch.export.Dim("batch", min=1, max=_MOST_BATCH)}
    graph = DeployedGraph(prepared(model.eval())).eval()
    try:
        with torch.no_grad(), _silent():
            program = torch.export.export(graph, (example,), dynamic_shapes=(dims,), strict=False)
            exported = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, input_names=["image"], output_names=list(Outputs._fields),
                external_data=False, verbose=False,
            )  # fmt: skip
            assert exported is not None
            # What depends on weights alone, however large.
            fold_constants(exported.model, input_size_limit=MOST_BYTES, output_size_limit=MOST_BYTES)
    except Exception as error:  # torch.export raises a dozen types of its own
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(f"this model cannot be exported: {type(error).__name__}: {reason}") from error
    proto = exported.model_proto
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    return proto


def write(proto: Any, path: Path) -> None:
    """Write a graph as ``.onnx``, or as ``.xml`` for OpenVINO; a ConfigError where it is too large for ONNX.

    Notes of the exporter are dropped, as they hold paths of this machine.
    """
    import onnx

    graph = proto.graph
    for noted in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del noted.metadata_props[:]
        noted.ClearField("doc_string")
    del graph.value_info[:]
    gigabytes = proto.ByteSize() / 1e9
    if path.suffix == ".onnx":
        if proto.ByteSize() > MOST_BYTES:
            raise ConfigError(f"{gigabytes:.1f} GB do not fit into one ONNX file (2 GB); type --out {path.stem}.xml")
        onnx.save(proto, str(path))
        return
    import openvino as ov

    step = path.parent / "steps" / "fp32.onnx"
    step.parent.mkdir()
    onnx.save(proto, str(step), save_as_external_data=proto.ByteSize() > MOST_BYTES)
    ov.save_model(ov.Core().read_model(step), path, compress_to_fp16=False)


@contextmanager
def _silent() -> Iterator[None]:
    """The exporter prints remarks on stdout, which belongs to the commands' results."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# ------------------------------------------------------------------------------------------- side by side


def compare(
    reference: Runtime, exported: Runtime, images: Sequence[Pixels], decision: Decision, progress: Progress
) -> Comparison:
    """Run both on the same pixels, one image and three in turn.

    ``images`` are uint8 RGB of the model's size; without any some are painted. ``decision`` judges both scores.
    """
    squares, place = images or painted(reference.size), 0
    answers: list[tuple[Answers, Answers]] = []
    while place < len(squares):
        batch = np.stack(squares[place : place + (3 if len(answers) % 2 else 1)])
        answers.append((reference.run(batch), exported.run(batch)))
        place += len(batch)
        progress("comparing with torch", place, len(squares))
    a, b = (
        {name: np.concatenate([answer[name] for answer in side]) for name in side[0]}
        for side in zip(*answers, strict=True)
    )
    close = np.abs(a["score_B"] - b["score_B"]) <= _ROUNDING * np.maximum(1.0, np.abs(a["score_B"]))
    alike = close & (a["cluster_B"] == b["cluster_B"])
    judged = zip(_judged(a, decision), _judged(b, decision), alike, strict=True)
    changed = sum(before != after and not rounded for before, after, rounded in judged) if images else 0
    gaps = _gap(a["score_B"], b["score_B"]), _gap(a["map_B1HW"], b["map_B1HW"])
    return Comparison(len(squares), not images, *gaps, changed)


def _judged(out: Answers, decision: Decision) -> list[str]:
    distance_B = out.get("cluster_distance_B", np.full(len(out["score_B"]), np.nan))
    columns = (column.tolist() for column in (out["score_B"], out["cluster_B"], distance_B))
    return [decision.judge(*row)["answer"] for row in zip(*columns, strict=True)]


def _gap(reference: NDArray[Any], exported: NDArray[Any]) -> float:
    if reference.shape != exported.shape:
        return float("inf")
    gap = np.abs(reference - exported) / np.maximum(1.0, np.abs(reference))
    return float(gap.max()) if np.isfinite(gap).all() else float("inf")


def load_images(source: Any, size: int) -> list[Pixels]:
    """Images, at most 100 and spread evenly over their order; a DataError where one cannot be read."""
    items, squares = list(expand(source)), list[Pixels]()
    number = min(len(items), _MOST)
    for item in (items[i * len(items) // number] for i in range(number)):
        image = decode(item, Decoding(size))
        if image.square is None:
            raise DataError(image.error)
        squares.append(image.square)
    return squares


def painted(size: int) -> list[Pixels]:
    """Pictures for exports without any images at hand; every second one has a white square."""
    rng = np.random.default_rng(0)
    squares = [made_up_rgb(rng, size) for _ in range(_FEWEST)]
    for square in squares[1::2]:
        square[size // 3 : size // 2, size // 3 : size // 2] = 255
    return squares
