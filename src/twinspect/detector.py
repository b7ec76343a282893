"""The Python face of twinspect: fit, predict, save, load."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from twinspect.config import ModelConfig, RunConfig, TrainConfig, of_effort
from twinspect.errors import ConfigError, TwinspectError
from twinspect.types import Sample

if TYPE_CHECKING:
    from twinspect.inference.predictor import Predictor
    from twinspect.inference.result import Result
    from twinspect.storage import Fitted
    from twinspect.training.source import Progress
    from twinspect.types import Skipped


class Detector:
    """Learns what normal looks like from good images of many classes, then scores and localises the rest.

    The constructor only notes what is wanted: nothing is read, downloaded or built before `fit`.

    Args:
        teacher: ``auto``, a short name such as ``efficientnet-lite0`` or ``dinov2-base``, or any timm name.
        size: input side in pixels; 0 takes the teacher's default.
        weights: local weights file of the teacher.
        pretrained: False gives a random-weight teacher (tests of shape and speed only).
        config: full settings; the other arguments are then left alone.
        effort: ``fast`` (half the input side, fewer steps) or ``default``.

    Example:
        >>> detector = Detector("efficientnet-lite0").fit("data/")
        >>> detector.predict("new/part.png").is_anomaly
    """

    def __init__(
        self,
        teacher: str = "auto",
        size: int = 0,
        weights: str | Path = "",
        pretrained: bool = True,
        config: RunConfig | None = None,
        effort: str = "default",
    ) -> None:
        dial = of_effort(effort)
        model: dict[str, Any] = {"teacher": teacher, "weights": str(weights), "pretrained": pretrained}
        model |= dial["model"] | ({"size": size} if size else {})
        self.config = config or RunConfig(ModelConfig(**model), TrainConfig(**dial["train"]))
        self._fitted: Fitted | None = None
        self._predictor: Predictor | None = None

    def fit(
        self,
        data: str | Path | Iterable[Sample] | Iterable[str | Path],
        steps: int | None = None,
        seed: int | None = None,
        work: str | Path | None = None,
        progress: Progress | None = None,
        resume: bool = False,
    ) -> Detector:
        """Train on the normal training images of a data set folder, or of a list of samples or good files.

        Args:
            data: folder in any layout that `twinspect.data.load` knows, samples, or paths of good images.
            steps: optimiser steps, instead of the configuration's.
            seed: instead of the configuration's.
            work: folder for checkpoint and log; a killed run resumes from it.
            progress: called with (stage, done, total).
            resume: go on from what this detector has learnt; ``data`` must hold the old classes as well.

        Returns:
            This detector.

        Raises:
            DataError: nothing to learn from, or old classes are missing.
        """
        from twinspect.training.fit import fit, silent
        from twinspect.training.resume import remove_checkpoint

        changes = {k: v for k, v in (("steps", steps), ("seed", seed)) if v is not None}
        train: TrainConfig = dataclasses.replace(self.config.train, **changes)  # type: ignore[arg-type]
        self.config = dataclasses.replace(self.config, train=train)
        folder = Path(work) if work is not None else None
        before = self.fitted if resume else None
        self._fitted = fit(as_samples(data), self.config, folder, progress or silent, before)
        if folder is not None:
            remove_checkpoint(folder)
        self._predictor = None
        return self

    def calibrate(
        self,
        good: str | Path | Iterable[Sample] | Iterable[str | Path],
        max_fpr: float | None = None,
        class_name: str | None = None,
        unsure: float | None = None,
        add: bool = False,
        progress: Progress | None = None,
    ) -> Detector:
        """Set thresholds from good images the model was not trained on; the model stays as it is.

        Args:
            good: folder, samples, or paths of good images.
            max_fpr: share of good images that may be called bad; None keeps what was set.
            class_name: class of all images, and the only one whose budget changes; None goes by the data.
            unsure: share of good images that may be called bad or unsure, for a third answer.
            add: keep the calibration images there are, instead of replacing those of the same classes.
            progress: called with (stage, done, total).

        Returns:
            This detector.

        Raises:
            ConfigError: a rate that so few images cannot support (the message says how many are needed).
            DataError: too few images.
        """
        import warnings

        from twinspect.decide.recalibrate import Wanted, good_samples, recalibrate, score_images
        from twinspect.training.fit import silent

        wanted = Wanted(max_fpr, unsure, class_name=class_name, add=add)
        predictor = self.predictor()
        scored = score_images(predictor, good_samples(as_samples(good)), class_name, None, progress or silent)
        self.fitted.decision, notes = recalibrate(self.fitted.decision, wanted, scored)
        for note in (*scored.failed, *notes):
            warnings.warn(note, stacklevel=2)
        self._predictor = None
        return self

    @overload
    def predict(
        self, source: Any, stream: Literal[True], maps: bool = True, class_name: str | None = None
    ) -> Iterator[Result]: ...
    @overload
    def predict(
        self, source: Any, stream: Literal[False] = False, maps: bool = True, class_name: str | None = None
    ) -> Any: ...
    def predict(self, source: Any, stream: bool = False, maps: bool = True, class_name: str | None = None) -> Any:
        """Score images.

        Args:
            source: path, folder, glob, ``@list``, archive, table, URL, video file, ``camera:0``, ``rtsp://...``,
                `inference.watch(folder)`, PIL image, bytes of an image file, open file,
                array (H x W, H x W x C or C x H x W of 1, 3 or 4 channels; uint8, uint16, or floats from 0 to 1; of
                numpy or torch; four dimensions are a stack), or any iterable of these.
            stream: True gives an iterator with constant memory instead of a list. A camera, and an iterable without a
                length, such as a generator, is then answered image by image, before the next one is taken.
            maps: keep anomaly maps and images (needed for overlays).
            class_name: class of all images, whose thresholds then hold; None predicts it per image.

        Returns:
            One `Result` for a single image, else a list (or an iterator with ``stream=True``).

        Raises:
            DataError: nothing found.
            ImageError: an array of a wrong kind, an object that holds no image, or a single image that cannot be
                read. An unreadable file among several gives a `Result` with ``error`` instead.
        """
        from twinspect.inference.decode import is_single
        from twinspect.inference.video import is_endless

        if is_endless(source) and not stream:
            raise ConfigError(
                f"{source} does not end: type predict({source!r}, stream=True), and take results from it"
            )
        single = is_single(source)
        live = None if stream else False
        found = self.predictor().predict(source, maps=maps, pixels=maps, class_name=class_name, live=live)
        if stream:
            return found
        results = list(found)
        return results[0] if single else results

    def predictor(self) -> Predictor:
        """The predictor behind `predict`, built once."""
        from twinspect.inference.predictor import Predictor
        from twinspect.inference.runtimes import TorchRuntime

        if self._predictor is None:
            fitted = self.fitted
            self._predictor = Predictor(TorchRuntime(fitted.model), fitted.decision)
        return self._predictor

    def save(self, path: str | Path, thin: bool = False) -> Path:
        """Write one bundle file and return its path; ``thin`` leaves the teacher's weights out."""
        from twinspect.storage import save

        return save(self.fitted, Path(path), thin)

    @classmethod
    def load(cls, path: str | Path, weights: str | Path = "") -> Detector:
        """Read a bundle; ``weights`` is the teacher's file for a thin one whose teacher is not on this disk.

        Raises:
            BundleError: damaged, tampered with, too new, or the teacher on this disk is another one.
        """
        from twinspect.storage import load

        fitted = load(Path(path), str(weights))
        detector = cls(config=fitted.config)
        detector._fitted = fitted
        return detector

    @property
    def fitted(self) -> Fitted:
        """The trained model and its record.

        Raises:
            TwinspectError: before `fit` or `load`.
        """
        if self._fitted is None:
            raise TwinspectError("this detector is not trained yet; call fit(data) or Detector.load(path) first")
        return self._fitted

    @property
    def skipped_(self) -> list[Skipped]:
        """Training images that were left out, with reasons."""
        return self.fitted.skipped

    @property
    def record_(self) -> dict[str, Any]:
        """How the model came to be: teacher, sizes, counts, training."""
        return self.fitted.record


def as_samples(data: Any) -> list[Sample]:
    """What `Detector.fit` was given, as samples."""
    from twinspect import data as data_room
    from twinspect.data.folders import good_files

    if isinstance(data, (str, os.PathLike)):
        return list(data_room.load(Path(data)).samples)
    items = list(data) if isinstance(data, Iterable) else [data]
    if all(isinstance(item, Sample) for item in items):
        return items
    if all(isinstance(item, (str, os.PathLike)) for item in items):
        return good_files(Path(item) for item in items)
    raise ConfigError("fit takes a folder, a list of Sample, or a list of paths of good images")
