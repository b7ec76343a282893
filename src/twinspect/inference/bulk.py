"""Prediction over large sets: constant memory, a table written in parts, and runs that go on after being killed.

`run` is the whole command. No torch import here: the light install runs it too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from itertools import chain, count, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinspect.bundle import read_meta
from twinspect.data.images import SEVERAL_SUFFIXES, count_pictures, is_image
from twinspect.data.tables import has_columns, read_table
from twinspect.errors import ConfigError, DataError, TwinspectError, required
from twinspect.files import is_url, refuse_unwritable
from twinspect.inference.job import Job, is_endless
from twinspect.inference.outputs import (
    FORMATS,
    Part,
    PartStore,
    coco_line,
    encode,
    is_own_coco,
    join,
    places,
    save_pictures,
    write_coco,
)  # fmt: skip
from twinspect.inference.predictor import Predictor, load_predictor
from twinspect.inference.result import Result, columns, counted
from twinspect.inference.sources import walk_all, watch, would_find
from twinspect.inference.streams import Item, Stream
from twinspect.types import Progress, silent

if TYPE_CHECKING:
    from twinspect.console import Console

_LOOK_SECONDS = 2.0  # between looks at what a cluster has done
_LOOKED_INTO = 200  # files that are opened before the work, to find out whether they hold several pictures
# Options that parts of one run must have in common, beside the model and the columns.
_FIXED = (
    "class_name",
    "precision",
    "maps",
    "masks",
    "overlays",
    "overlay_format",
    "overlay_side",
    "submission",
    "coco",
)
Skipped = Callable[[Part], None]  # told of a part that an earlier run had done
Visit = Callable[[dict[str, Any]], None]  # told of a row


@dataclass(slots=True)
class Totals:
    """Images so far."""

    rows: int = 0
    bad: int = 0  # anomalous ones
    errors: int = 0  # that could not be read
    before: int = 0  # that an earlier run had done
    several: int = 0  # files among the first ones that hold several pictures, such as TIFFs of many pages
    expected: int = 0  # all images, 0 until it is known

    @property
    def nothing_scored(self) -> bool:
        """Whether there were images, and none could be read."""
        return self.rows == self.errors > 0

    def fails(self, on: str) -> bool:
        """Whether a run has failed by --fail-on: ``error``: an image could not be read; ``anomaly``: or is one."""
        return bool(on) and (self.errors > 0 or (on == "anomaly" and self.bad > 0))

    def add(self, rows: int, bad: int, errors: int) -> None:
        """Count images."""
        self.rows, self.bad, self.errors = self.rows + rows, self.bad + bad, self.errors + errors


# ----------------------------------------------------------------------------------------- the input, cut


@dataclass(frozen=True, eq=False)
class Unit:
    """What one worker is given at a time: listed images, or one archive or table of them."""

    number: int  # in the input
    content: tuple[Item | Stream, ...]

    @property
    def is_stream(self) -> bool:
        """Whether nobody knows how many images it has before it is read."""
        return isinstance(self.content[0], Stream)

    @cached_property
    def digest(self) -> str:
        """What identifies its images."""
        identities = "\0".join(file.identity for file in self.content)
        return hashlib.sha256(identities.encode("utf-8", "backslashreplace")).hexdigest()[:16]

    def images(self) -> Iterator[Item]:
        """Its images, lazily."""
        return chain.from_iterable(file.items() for file in self.content)


def units(files: Iterable[Item | Stream], rows: int) -> Iterator[Unit]:
    """Cut the input: every ``rows`` listed images are a unit, every stream is one."""
    number = count()
    for kind, alike in groupby(files, key=type):
        while content := tuple(islice(alike, 1 if kind is Stream else rows)):
            yield Unit(next(number), content)


# -------------------------------------------------------------------------------------------- scoring it


def score(job: Job, store: PartStore, units: Iterable[Unit], skipped: Skipped) -> Iterator[Part]:
    """Score units in order, without parts that the store knows; ``skipped`` is told of those.

    A part is given when its rows are safely stored. The model is loaded for the first. No batch holds images of two
    parts, so that a run that went on has the rows of one that was not killed.
    """
    listed = (pair for unit in units for pair in _listed(job, store, unit, skipped))
    first = next(listed, None)
    if first is None:
        return
    predictor = _loaded(job)
    with closing(predictor.decode_ahead(chain([first], listed), bool(job.overlays))) as decoded:
        for (unit, sub), pairs in groupby(decoded, key=lambda pair: pair[0]):
            rows, lines = list[dict[str, Any]](), list[bytes]()
            images = (image for _, image in pairs)
            results = predictor.score(images, job.wants_maps, job.class_name or None)
            for number, result in enumerate(results, start=sub * job.rows_of_a_part):
                save_pictures(result, job, unit.number, number)
                rows.append(result.row())
                lines += [coco_line(result)] if job.coco else []
            bad, errors = sum(bool(row["is_anomaly"]) for row in rows), sum(bool(row["error"]) for row in rows)
            part = Part(unit.number, sub, len(rows), bad, errors, unit.digest, store.suffix)
            store.put(part, encode(rows, part.suffix), b"".join(lines))
            yield part


def _listed(job: Job, store: PartStore, unit: Unit, skipped: Skipped) -> Iterator[tuple[tuple[Unit, int], Item]]:
    """A unit's images with the part of each, without those of parts that are there."""
    parts, most = store.of_unit(unit.number, unit.digest), job.rows_of_a_part
    for part in parts:
        skipped(part)
    if parts and (not unit.is_stream or parts[-1].rows < most):  # an archive's last part has fewer rows
        return
    for number, item in enumerate(unit.images()):
        if number >= most * len(parts):
            yield (unit, number // most), item


def _loaded(job: Job) -> Predictor:
    predictor = load_predictor(job.model, job.threads, job.batch, job.device, job.precision)
    predictor.decision.checked_class(job.class_name or None)
    processes = max(1, min(8, (os.cpu_count() or 1) - 1)) if job.workers < 0 and job.keeps_parts else job.workers
    if processes > 0:
        predictor.workers, predictor.processes = processes, True
    return predictor


def score_on_ray(job: Job, store: PartStore, progress: Progress) -> None:
    """Have a cluster make the parts: each of its tasks is a process with one model, and scores a share.

    A task that is lost is done again, and goes on like any other run that was killed. A TwinspectError where one
    failed for good.
    """
    ray = required("ray", "--engine ray", "twinspect[ray]")
    _connect(ray, job.ray_address)
    waiting = _ray_tasks(ray, job)
    try:
        while waiting:
            done, waiting = ray.wait(waiting, timeout=_LOOK_SECONDS)
            ray.get(done)
            store.look()
            progress("scoring on Ray", sum(part.rows for part in store.known.values()), 0)
    except ray.exceptions.RayError as error:
        raise TwinspectError(
            f"the run on Ray stopped ({_reason(error)}); finished parts are kept, type the same command to go on"
        ) from None
    finally:
        for task in waiting:
            ray.cancel(task, force=True)


def _connect(ray: Any, address: str) -> None:
    """Join a cluster, or start one that ends with this process."""
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # asks for a choice between two behaviours
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what goes wrong is raised as well
    try:
        ray.init(address or None, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        raise TwinspectError(f"Ray at {address} cannot be reached ({error})") from None


def _ray_tasks(ray: Any, job: Job) -> list[Any]:
    kind, each = ("GPU", job.actor_gpus) if job.actor_gpus else ("CPU", job.actor_cpus)
    count = job.actors or max(1, int(ray.cluster_resources().get(kind, 0) / each))
    task = ray.remote(max_retries=-1, num_cpus=job.actor_cpus, num_gpus=job.actor_gpus)(_score_share)
    number, of = job.share
    shares = (f"{number + of * i}/{of * count}" for i in range(count))
    local = replace(job, engine="local", workers=max(job.workers, 0))
    return [task.remote(replace(local, shard=share), os.getcwd()) for share in shares]


def _score_share(job: Job, home: str) -> None:
    if os.path.isdir(home):
        os.chdir(home)  # so that relative paths mean what they mean to whoever typed them
    store = store_of(job)
    store.look()
    _keep_parts(job, store, walk_all(job.sources), silent, Totals())


def _reason(error: Exception) -> str:
    """The line of an error that a person can use: that of our own code, if it is in there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ours = [line.split("Error: ", 1)[1] for line in lines if line.startswith("twinspect.") and "Error: " in line]
    return (ours or lines or [type(error).__name__])[-1][:300]


# ------------------------------------------------------------------------------------- the whole command


def run(job: Job, console: Console, visit: Visit | None = None) -> Totals:
    """Score what is not scored yet, and make the table; ``visit`` is called with every row."""
    job.check()
    totals = Totals()
    # An empty source is refused before the model is loaded.
    files = _counting_several(watch(*job.sources) if job.watch else walk_all(job.sources), totals)
    check_outputs(job)
    if not job.keeps_parts:
        _print(job, files, console, totals, visit)
        return totals
    number, of = job.share
    label, store = "" if of == 1 else f"-{number}-of-{of}", store_of(job)
    settings = _settings(job)
    with closing(store.lock(label)):
        store.look()
        # A run that failed before its first part left nothing to go on with. Shards may be at theirs just now.
        nothing_left = not job.is_folder and not store.known
        store.begin(settings, job.restart or nothing_left)
        store.look()
        totals.before = sum(part.rows for part in store.known.values())
        if totals.before:
            scored = counted(totals.before, "image")
            console.warn(f"{job.out}: an earlier run scored {scored}; going on with the others (--restart: anew)")
        elif os.path.isfile(job.out):
            console.warn(f"{job.out} is there already: this run replaces it")
        if job.engine == "ray":
            score_on_ray(job, store, console.progress)
        _keep_parts(job, store, files, console.progress, totals)
        if job.coco:
            write_coco(store.coco_lines, Path(job.coco))
        if job.is_folder:
            store.finish(label)
        else:
            join(store.bodies(), Path(job.out))
            store.clear(all_of_it=True)
    if visit is not None:
        for row in read_table(Path(job.out), errors="surrogateescape"):
            visit(row)
    return totals


def store_of(job: Job) -> PartStore:
    """Where parts are kept: the folder itself, or one beside the file until it is whole."""
    folder, suffix = (job.out, ".parquet") if job.is_folder else (f"{job.out}.parts", Path(job.out).suffix)
    return PartStore(folder, suffix, job.share)


def check_outputs(job: Job) -> None:
    """Find out before the work whether all can be written, and that no picture comes to lie among the images.

    A ConfigError where not, also where another program's file would be replaced.
    """
    if job.keeps_parts and not job.is_folder:
        out = Path(job.out)
        if out.suffix not in FORMATS:
            accepted = f"accepted endings are {', '.join(FORMATS)}; a folder (DIR/) takes Parquet parts"
            raise ConfigError(f"--out {out.name}: {accepted}")
        if out.suffix == ".parquet" and find_spec("pyarrow") is None:
            raise ConfigError(f"--out {out.name}: Parquet needs pyarrow; type: pip install pyarrow, or take .csv")
        refuse_unwritable(out, "--out", ours=lambda path: has_columns(path, {"path", "score"}))
    if job.coco:
        refuse_unwritable(Path(job.coco), "--coco", ours=is_own_coco)
    for option, place in places(job):
        if not is_url(place):
            refuse_unwritable(Path(place), option)
        if is_image(place) and _reads_again(job.sources, place):
            raise ConfigError(
                f"{option} {os.path.dirname(place)}: images are read from there, and the next run would take "
                f"these pictures for images; choose a folder outside of {', '.join(job.sources[:3])}"
            )


def _reads_again(sources: Iterable[str], place: str) -> bool:
    """Whether the same command would read a picture that it has written; a shell expands globs to their files."""
    like = (path for path in sources if is_image(path) and path.lower().endswith(Path(place).suffix))
    beside = sum(Path(path).resolve().parent == Path(place).resolve().parent for path in like)
    return beside > 1 or any(would_find(source, place) for source in sources)


def _settings(job: Job) -> dict[str, Any]:
    decision = json.dumps(read_meta(job.model)["decision"], sort_keys=True)  # it names the model
    return {
        "model": hashlib.sha256(decision.encode()).hexdigest()[:16],
        "columns": " ".join(column.name for column in columns()),  # another version may have others
        "names-of-parts": 2,
        "part-rows": job.rows_of_a_part,
        **{name.removesuffix("_name").replace("_", "-"): getattr(job, name) for name in _FIXED},
    }


def _counting_several(files: Iterable[Item | Stream], totals: Totals) -> Iterator[Item | Stream]:
    """The same, and counts the files that hold several pictures: of the first ones, as each must be opened for it."""
    looked = 0
    for file in files:
        if isinstance(file, Item) and file.is_file and looked < _LOOKED_INTO:
            path = Path(file.path)
            looked += path.suffix.lower() in SEVERAL_SUFFIXES
            totals.several += count_pictures(path) > 1
        yield file


def _keep_parts(
    job: Job, store: PartStore, files: Iterable[Item | Stream], progress: Progress, totals: Totals
) -> None:
    """Score what the store does not know."""
    (number, of), stale = job.share, set(store.known)

    def add(part: Part) -> None:
        stale.discard(part.place)
        totals.add(part.rows, part.bad, part.errors)

    mine = (unit for unit in units(files, job.rows_of_a_part) if unit.number % of == number)
    if of == 1 and not any(map(is_url, job.sources)):
        threading.Thread(target=_count, args=(job.sources, totals), daemon=True).start()
    for part in score(job, store, mine, add):
        store.known[part.place] = part
        add(part)
        progress(f"scoring  {totals.bad} anomalous", totals.rows, totals.expected)
    if stale:
        raise DataError(
            f"{store.folder} holds rows of images that are no longer given ({store.known[min(stale)].name}); type "
            "--restart to begin anew"
        )


def _count(sources: Iterable[str], totals: Totals) -> None:
    """Count the images beside the work, for the time left; not those in archives, as that would be reading them."""
    images = 0
    with suppress(DataError):  # said by the run itself
        for file in walk_all(sources):
            if isinstance(file, Stream):
                return
            images += 1
        totals.expected = images


def _print(job: Job, files: Iterable[Item | Stream], console: Console, totals: Totals, visit: Visit | None) -> None:
    predictor = _loaded(job)
    images = chain.from_iterable(file.items() for file in files)
    results = predictor.predict(images, job.wants_maps, bool(job.overlays), job.class_name or None, job.is_live)
    for number, result in enumerate(results):
        save_pictures(result, job, 0, number)
        totals.add(1, bool(result.is_anomaly), bool(result.error))
        row = result.row()
        console.result(encode([row], ".jsonl").decode().rstrip() if job.prints_rows else say_result(result))
        if visit is not None:
            visit(row)
        if (job.watch or is_endless(job.sources[0])) and totals.fails(job.fail_on):
            break


def say_result(result: Result) -> str:
    """One line for one image."""
    if result.error:
        return f"ERROR    {result.error}".replace("\n", "\\n")
    word = "ANOMALY" if result.is_anomaly else result.answer
    kind = f"{result.class_name}{' (as a whole unlike its good images)' if result.unknown_class else ''}"
    regions = f"  {counted(len(result.regions), 'region')}" if result.regions else ""
    numbers = f"score {result.score:9.3f}  severity {result.severity:6.2f}  p {result.p_value:.4f}"
    line = f"{word:<8} {numbers}  {kind}{regions}  {result.path}"
    return line.replace("\n", "\\n")  # names may hold some, and would make lines that look like other images


def say_totals(totals: Totals, out: str) -> str:
    """The last line of a run."""
    before = f" ({totals.before} of them by an earlier run)" if totals.before else ""
    where = f"; table: {out}" if out not in ("", "-") else ""
    files = counted(totals.several, "file")
    several = f"; {files} with several pictures: the first of each was read" if totals.several else ""
    counts = f"{totals.bad} anomalous, {totals.errors} could not be read"
    return f"{counted(totals.rows, 'image')}{before}: {counts}{where}{several}"
