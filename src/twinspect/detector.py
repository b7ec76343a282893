"""The Python face of twinspect: fit, predict, save, load."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinspect.config import SMALLEST, ModelConfig, RunConfig, TrainConfig, of_effort
from twinspect.console import Console
from twinspect.decide.decision import HAND, Threshold
from twinspect.device import choose_device
from twinspect.errors import ConfigError, DataError, ImageError, TwinspectError, listed
from twinspect.types import TRAIN, Sample, silent

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from twinspect.bundle import Fitted
    from twinspect.inference.predictor import Predictor
    from twinspect.types import Progress, Skipped


class Detector:
    """Learns what normal looks like from good images of many classes, then scores and localises the rest.

    The constructor only notes what is wanted: nothing is read, downloaded or built before `fit`.

    Args:
        teacher: ``auto``, a short name such as ``efficientnet-lite0`` or ``dinov2-base``, or any timm name.
        size: input side in pixels; 0 takes the teacher's default.
        weights: local weights file of the teacher.
        pretrained: False gives a random-weight teacher (tests of shape and speed only).
        config: full settings; the other arguments are then left alone.
        effort: ``instant`` (statistics of good images only, no training steps), ``fast`` (half the input side, fewer
            steps) or ``default``.

    Examples:
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
        model: dict[str, Any] = {"teacher": teacher, "size": size, "weights": weights, "pretrained": pretrained}
        self._given = {**model, "config": config, "effort": effort}
        dial = of_effort(effort)
        model |= {"weights": str(weights), **dial["model"]} | ({"size": size} if size else {})
        self.config = config or RunConfig(ModelConfig(**model), TrainConfig(**dial["train"]))
        self._fitted: Fitted | None = None
        self._predictor: Predictor | None = None

    def fit(
        self,
        data: Any,
        steps: int | None = None,
        seed: int | None = None,
        work: str | Path | None = None,
        progress: Progress | None = None,
        resume: bool = False,
        bgr: bool = False,
        quiet: bool = False,
        roi: str | Path | NDArray[np.bool_] | None = None,
    ) -> Detector:
        """Train on the normal training images of a data set folder, or on good images, and return this detector.

        Args:
            data: folder in any layout that `twinspect.data.load` knows, samples, or good images: a glob, paths,
                arrays and PIL images as `predict` takes them, or a list of these.
            steps: optimiser steps, instead of the configuration's.
            seed: instead of the configuration's.
            work: folder for checkpoint and log; a killed run resumes from it.
            progress: called with (stage, done, total); without one a bar is shown on stderr.
            resume: go on from what this detector has learnt; ``data`` must hold the old classes as well.
            bgr: arrays have blue first, as OpenCV reads them.
            quiet: show nothing on stderr, neither progress nor notes on the data.
            roi: region of interest: a mask image, LabelMe polygons, or an array H x W that is true (above 0) inside;
                the rest is neither learnt nor scored.

        Raises:
            DataError: nothing to learn from, or old classes are missing.
        """
        import numpy as np

        from twinspect.data.samples import read_roi
        from twinspect.training.fit import fit
        from twinspect.training.loop import remove_checkpoint

        train = self.config.train
        steps, seed = train.steps if steps is None else steps, train.seed if seed is None else seed
        self.config = dataclasses.replace(self.config, train=dataclasses.replace(train, steps=steps, seed=seed))
        folder, before = Path(work) if work is not None else None, self.fitted if resume else None
        inside = read_roi(Path(roi)) if isinstance(roi, (str, os.PathLike)) else roi
        inside = None if inside is None else np.asarray(inside) > 0
        samples = as_samples(data, bgr)
        with _shown(progress, quiet) as (told, notes):
            self._fitted, self._predictor = fit(samples, self.config, folder, told, before, roi=inside), None
            notes += self._fitted.record["notes"]
        if folder is not None:
            remove_checkpoint(folder)
        return self

    def update(
        self,
        good: Any,
        class_name: str | None = None,
        progress: Progress | None = None,
        bgr: bool = False,
        quiet: bool = False,
    ) -> Detector:
        """Learn further good images without the old ones, after false alarms or of a new class; return this detector.

        Thresholds are made anew, with the budgets that were set. ``record_["updates"]`` lists what was learnt; save
        the model before, if it may have to be taken back.

        Args:
            good: as `fit` takes it.
            class_name: class of all images, known or new; None goes by the data, or the only class there is.
            progress: as in `fit`.
            bgr: as in `fit`.
            quiet: as in `fit`.

        Raises:
            BundleError: the model keeps nothing that images can be added to.
            ConfigError: a class that is not known, and ``class_name`` does not say that it is new.
            DataError: nothing new, or fewer than nine images of a new class.
        """
        from twinspect.training.outcome import update

        classes, samples = self.fitted.decision.classes, as_samples(good, bgr)
        only = len(classes) == 1 and {s.class_name for s in samples} == {"normal"}
        name = classes[0] if class_name is None and only else class_name
        with _shown(progress, quiet) as (told, notes):
            self._fitted, self._predictor = update(self.fitted, samples, name, told), None
            notes += self._fitted.record["notes"]
        return self

    def calibrate(
        self,
        good: Any,
        max_fpr: float | None = None,
        class_name: str | None = None,
        unsure: float | None = None,
        add: bool = False,
        progress: Progress | None = None,
        quiet: bool = False,
    ) -> Detector:
        """Set thresholds from good images the model was not trained on, and return this detector; the model stays.

        Args:
            good: as `fit` takes it.
            max_fpr: share of good images that may be called bad; None keeps what was set.
            class_name: class of all images, and the only one whose budget changes; None goes by the data.
            unsure: share of good images that may be called bad or unsure, for a third answer.
            add: keep the calibration images there are, instead of replacing those of the same classes.
            progress: as in `fit`.
            quiet: as in `fit`.

        Raises:
            ConfigError: a rate that so few images cannot support (the message says how many are needed).
            DataError: too few images.
        """
        from twinspect.decide.recalibrate import good_samples, recalibrate, score_images

        samples = good_samples(as_samples(good))
        with _shown(progress, quiet) as (told, notes):
            scored = score_images(self.predictor(), samples, class_name, told)
            self.fitted.decision, remarks = recalibrate(
                self.fitted.decision, scored, None, max_fpr, unsure, class_name, add
            )
            notes += [*scored.failed, *remarks]
        self._predictor = None
        return self

    def predict(
        self,
        source: Any,
        stream: bool = False,
        maps: bool = True,
        class_name: str | None = None,
        bgr: bool = False,
    ) -> Any:
        """Score images.

        Args:
            source: path, folder, glob, ``@list``, archive, table, URL, video file, ``camera:0``, ``rtsp://...``,
                `inference.watch(folder)`, PIL image, bytes of an image file, open file,
                array (H x W, H x W x C or C x H x W of 1, 3 or 4 channels; uint8, uint16, or floats from 0 to 1; of
                numpy or torch; four dimensions are a stack), or any iterable of these.
            stream: True gives an iterator with constant memory instead of a list. A camera, and an iterable without a
                length, such as a generator, is then answered image by image, before the next one is taken.
            maps: keep anomaly maps and images (needed for overlays). A list of results keeps no pixels of files;
                `Result.overlay` reads them again.
            class_name: class of all images, whose thresholds then hold; None predicts it per image.
            bgr: arrays have blue first, as OpenCV reads them.

        Returns:
            One `Result` for a single image, else `Results`, a list with ``to_pandas()`` (or an iterator with
            ``stream=True``).

        Raises:
            DataError: nothing found.
            ImageError: an array of a wrong kind, an object that holds no image, or a single image that cannot be
                read. An unreadable file among several gives a `Result` with ``error`` instead.
        """
        from twinspect.inference.decode import is_single
        from twinspect.inference.job import is_endless
        from twinspect.inference.result import Results

        if is_endless(source) and not stream:
            raise ConfigError(
                f"{source} does not end: type predict({source!r}, stream=True), and take results from it"
            )
        single, live = is_single(source), None if stream else False
        answers = self.predictor().predict(source, maps=maps, pixels=maps, class_name=class_name, live=live, bgr=bgr)
        if stream:
            return answers
        if single:
            return next(answers)
        results = Results()
        for result in answers:
            if result.rgb is not None and os.path.isfile(result.path):
                result.rgb = None  # a folder's pixels would fill the memory
            results.append(result)
        return results

    def score_samples(self, source: Any) -> NDArray[np.float64]:
        """Scores with the sign that scikit-learn's ``score_samples`` has: the lower, the more anomalous.

        They are `Result.score` times -1, one for each image of ``source`` (as `predict` takes it), and NaN where an
        image could not be read. Everywhere else in this library a higher score is more anomalous.
        """
        import numpy as np

        results = self.predictor().predict(source, maps=False, pixels=False, live=False)
        return np.array([-result.score for result in results], dtype=np.float64)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """What the constructor was given, by name, for ``sklearn.base.clone``; ``deep`` has no effect."""
        return dict(self._given)

    def predictor(self) -> Predictor:
        """The predictor behind `predict`, built once."""
        from twinspect.inference.predictor import Predictor, TorchRuntime

        if self._predictor is None:
            runtime = TorchRuntime(self.fitted.model, choose_device(self.config.train.device))
            self._predictor = Predictor(runtime, self.fitted.decision, runtime.usual)
        return self._predictor

    def save(self, path: str | Path) -> Path:
        """Write one bundle file and return its path."""
        from twinspect.bundle import save

        return save(self.fitted, Path(path))

    @classmethod
    def load(cls, path: str | Path, device: str = "auto") -> Detector:
        """Read a bundle; ``device`` is where it predicts: ``auto`` (a GPU where there is one), ``cpu``, ``cuda:1``.

        Raises:
            BundleError: damaged, tampered with, or too new.
        """
        from twinspect.bundle import load

        fitted = load(Path(path))
        train = dataclasses.replace(fitted.config.train, device=device)  # not where it was trained
        detector = cls(config=dataclasses.replace(fitted.config, train=train))
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
    def threshold(self) -> float:
        """Score from which on an image is anomalous: of the only class, or of all classes together.

        Can be set: to a number for every class, to a dict of class to number, or to None for what was promised.
        """
        return self.fitted.decision.threshold.value

    @threshold.setter
    def threshold(self, value: float | Mapping[str, float] | None) -> None:
        decision = self.fitted.decision
        fixed = dict(decision.fixed) if isinstance(value, Mapping) else {}
        by_class = value if isinstance(value, Mapping) else dict.fromkeys([*decision.classes, ""], value)
        for name, number in by_class.items():
            decision.checked_class(name or None)
            fixed.pop(name, None)
            if number is None:
                continue
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
                of_class = f" of {name}" if name else ""
                raise ConfigError(f"threshold {number!r}{of_class}: a finite number, or None")
            fixed[name] = Threshold(float(number), 0.0, False, f"{HAND}; nothing is promised")
        self.fitted.decision = dataclasses.replace(decision, fixed=fixed)
        self._predictor = None

    def __repr__(self) -> str:
        if self._fitted is None:
            size = f"{self.config.model.size} px, " if self.config.model.size else ""
            return f"Detector({self.config.model.teacher}, {size}not fitted)"
        record, decision = self._fitted.record, self._fitted.decision
        return (
            f"Detector({record['teacher']['name']}, {record['size']} px, classes: {listed(decision.classes, 3)}; "
            f"{len(decision.good)} good images, threshold {self.threshold:.3g})"
        )

    @property
    def skipped_(self) -> list[Skipped]:
        """Training images that were left out, with reasons."""
        return self.fitted.skipped

    @property
    def record_(self) -> dict[str, Any]:
        """How the model came to be: teacher, sizes, counts, training."""
        return self.fitted.record


@contextmanager
def _shown(progress: Progress | None, quiet: bool) -> Iterator[tuple[Progress, list[str]]]:
    """Who is told of progress, and a list for notes; unless ``quiet``, both are shown on stderr."""
    console, notes = Console(), list[str]()
    try:
        yield progress or (silent if quiet else console.progress), notes
    finally:
        console.finish()
    for note in () if quiet else notes:
        console.warn(note)


def as_samples(data: Any, bgr: bool = False) -> list[Sample]:
    """What `Detector.fit` was given, as samples; ``bgr`` says that arrays have blue first.

    Raises:
        ConfigError: something that holds no image.
        DataError: nothing found, or an encoded image in memory that cannot be read.
        ImageError: an array of a wrong kind.
    """
    from twinspect.data import load
    from twinspect.data.folders import good_files
    from twinspect.inference.decode import Decoding, as_item, decode, expand, from_bgr, is_array

    named = isinstance(data, (str, os.PathLike))
    if named and (os.path.exists(data) or not has_magic(os.fspath(data))):
        return list(load(Path(data)).samples)
    samples: list[Sample] = []
    for part in data if isinstance(data, Iterable) and not named and not is_array(data) else [data]:
        if isinstance(part, Sample):
            samples.append(part)
            continue
        one_file = isinstance(part, (str, os.PathLike)) and not (has_magic(os.fspath(part)) or os.path.isdir(part))
        try:
            items = [from_bgr(item) if bgr else item for item in ([as_item(part)] if one_file else expand(part))]
        except ImageError as error:
            raise ConfigError(
                f"fit takes a folder, a glob, a list of Sample, or good images: paths, arrays, PIL images ({error})"
            ) from None
        for item in items:
            if item.is_file or item.error:
                samples += good_files([Path(item.path)])
                continue
            decoded = decode(item, Decoding(SMALLEST, pixels=True))
            if decoded.rgb is None:
                raise DataError(decoded.error)
            name = Path(f"image {len(samples):06d} in memory")
            samples.append(Sample(name, TRAIN, "normal", pixels=decoded.rgb))
    return samples
