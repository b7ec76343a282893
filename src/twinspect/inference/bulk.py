"""Prediction over large sets: constant memory, a table written in parts, and runs that go on after being killed.

`run` is the whole command. `PartScorer` scores units of the input: here all of them, on Ray those that an actor is
given. No torch import here: the light install runs it too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import chain, count, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinspect.data.images import SEVERAL_SUFFIXES, count_pictures
from twinspect.errors import DataError
from twinspect.inference.archives import Item, Stream
from twinspect.inference.job import Job
from twinspect.inference.parts import Part, PartStore, Place, digest
from twinspect.inference.pictures import coco_line, save_pictures, write_coco
from twinspect.inference.predictor import Predictor
from twinspect.inference.result import Result, counted
from twinspect.inference.sources import walk_all, watch
from twinspect.inference.stores import is_url
from twinspect.inference.table import csv_header, encode, join, read_rows

if TYPE_CHECKING:
    from twinspect.console import Console

_LOOKED_INTO = 200  # files that are opened before the work, to find out whether they hold several pictures
Skipped = Callable[[Part], None]  # told of a part that an earlier run had done
Visit = Callable[[dict[str, Any]], None]  # told of a row


@dataclass(slots=True)
class Totals:
    """Images so far: all, anomalous, unreadable, and how many of them an earlier run had done.

    ``several`` counts files that hold several pictures, such as TIFFs of many pages, among the first ones.
    ``expected`` is the number of all images, 0 until it is known.
    """

    rows: int = 0
    bad: int = 0
    errors: int = 0
    before: int = 0
    several: int = 0
    expected: int = 0

    @property
    def nothing_scored(self) -> bool:
        """Whether there were images, and none could be read."""
        return self.rows == self.errors > 0

    def fails(self, on: str) -> bool:
        """Whether a run has failed by --fail-on: ``error``: an image could not be read; ``anomaly``: or is one."""
        return bool(on) and (self.errors > 0 or (on == "anomaly" and self.bad > 0))

    def add(self, part: Part, before: bool = False) -> None:
        """Count a part."""
        self.rows, self.bad, self.errors = self.rows + part.rows, self.bad + part.bad, self.errors + part.errors
        self.before += part.rows if before else 0


# ----------------------------------------------------------------------------------------- the input, cut


@dataclass(frozen=True, slots=True)
class Unit:
    """What one worker is given at a time: listed images, or one archive or table of them; its number in the input."""

    number: int
    content: tuple[Item | Stream, ...]

    @property
    def source(self) -> str:
        """Identity of the archive or table; empty for listed images, which have their own."""
        return self.content[0].identity if isinstance(self.content[0], Stream) else ""

    def images(self) -> Iterator[Item]:
        """Its images, lazily."""
        return chain.from_iterable(file.items() for file in self.content)


def units(files: Iterable[Item | Stream], rows: int) -> Iterator[Unit]:
    """Cut the input: every ``rows`` listed images are a unit, every stream is one."""
    number = count()
    for kind, alike in groupby(files, key=type):
        while content := tuple(islice(alike, 1 if kind is Stream else rows)):
            yield Unit(next(number), content)


def pending(units: Iterable[Unit], store: PartStore, skipped: Skipped) -> Iterator[Unit]:
    """Units that are not finished. Parts of finished ones are checked against their source and told of."""
    for unit in units:
        done = store.of_unit(unit.number)
        if not (done and done[-1].end):
            yield unit
            continue
        source = unit.source
        images = None if source else [item.identity for item in unit.images()]
        for part in done:
            store.check(part, source, images)
            skipped(part)


# -------------------------------------------------------------------------------------------- scoring it


@dataclass(slots=True, eq=False)
class _Begun:
    """A part whose images are being listed; the scorer comes after.

    ``source`` and ``images`` are identities. ``end``: whether the unit ends with it, known when its last image is.
    """

    unit: int
    sub: int
    source: str
    images: list[str] = field(default_factory=list)
    end: bool = False


class PartScorer:
    """One loaded model with its decoders, which makes parts where the ``store`` knows none; to be closed."""

    def __init__(self, job: Job, store: PartStore) -> None:
        self.job, self.store, self.predictor = job, store, _loaded(job)
        self.pool = self.predictor.pool(bool(job.pictures.overlays))

    def close(self) -> None:
        """End the decoders."""
        self.pool.__exit__()

    def parts(self, units: Iterable[Unit], skipped: Skipped) -> Iterator[Part]:
        """Score units in order; a part is given when its rows are safely stored.

        No batch holds images of two parts, so that a run that went on has the rows of one that was not killed.
        """
        pictures = self.job.pictures
        listed = (pair for unit in units for pair in self._listed(unit, skipped))
        for begun, images in groupby(self.pool.stream(listed), key=lambda pair: pair[0]):
            rows, lines = list[dict[str, Any]](), list[bytes]()
            results = self.predictor.score((image for _, image in images), pictures.wants_maps, self.job.class_name)
            for number, result in enumerate(results, start=begun.sub * self.job.part_rows):
                save_pictures(result, pictures, begun.unit, number)
                rows.append(result.row())
                lines += [coco_line(result)] if pictures.coco else []
            bad, errors = sum(bool(row["is_anomaly"]) for row in rows), sum(bool(row["error"]) for row in rows)
            key, suffix = digest(begun.source, begun.images), self.store.suffix
            part = Part(begun.unit, begun.sub, len(rows), bad, errors, key, begun.end, suffix)
            self.store.put(part, encode(rows, suffix), b"".join(lines) if pictures.coco else None)
            yield part

    def _listed(self, unit: Unit, skipped: Skipped) -> Iterator[tuple[_Begun, Item]]:
        """A unit's images with the part of each, without those of parts that are there."""
        images, source, sub = unit.images(), unit.source, count()
        item = next(images, None)
        while item is not None:
            part = _Begun(unit.number, next(sub), source)
            known = self.store.known.get((part.unit, part.sub))
            while item is not None and len(part.images) < self.job.part_rows:
                part.images.append(item.identity)
                if known is None:
                    yield part, item
                item = next(images, None)
            part.end = item is None
            if known is not None:
                self.store.check(known, source, part.images)
                skipped(known)


def _loaded(job: Job) -> Predictor:
    from twinspect.inference.runtimes import load_predictor

    predictor = load_predictor(job.model, job.threads, job.batch, job.weights, job.device)
    predictor.decision.checked_class(job.class_name)
    if job.decoders:
        predictor.workers, predictor.processes = job.decoders, True
    return predictor


# Who scores units: told of the job, the store, the units, and whom to tell of parts that were there already.
Engine = Callable[[Job, PartStore, Iterator[Unit], Skipped], Iterator[Part]]


def local(job: Job, store: PartStore, units: Iterator[Unit], skipped: Skipped) -> Iterator[Part]:
    """The engine that is this process."""
    first = next(units, None)
    if first is None:
        return  # everything is there: the model need not be loaded
    with closing(PartScorer(job, store)) as scorer:
        yield from scorer.parts(chain([first], units), skipped)


# ------------------------------------------------------------------------------------- the whole command


def run(job: Job, console: Console, engine: Engine | None = None, visit: Visit | None = None) -> Totals:
    """The whole command: score what is not scored yet, make the table, say what came out.

    Args:
        job: what to run; it says what is wrong with its sources, model or outputs.
        console: told of progress and results.
        engine: who scores the units; None is this process.
        visit: called with every row, once all are there where a table is written.
    """
    totals = Totals()
    # An empty source is refused before the model is loaded.
    files = _counting_several(watch(*job.sources) if job.watch else walk_all(job.sources), totals)
    job.check_outputs()
    if not job.keeps_parts:
        _print(job, files, console, totals, visit)
        return totals
    label = "" if job.shard[1] == 1 else f"-{job.shard[0]}-of-{job.shard[1]}"
    store, settings = job.store(), job.settings()
    with closing(store.lock(label)):
        store.begin(settings, job.restart)
        seen = _keep_parts(job, store, files, console, engine or local, totals)
        if job.pictures.coco:
            write_coco(lambda: store.bodies(seen, aside=True), Path(job.pictures.coco))
        if job.is_folder:
            store.finish(label)
        else:
            join(store.bodies(seen), Path(job.out))
            store.clear(all_of_it=True)
    if visit is not None:
        for row in read_rows(Path(job.out)):
            visit(row)
    return totals


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
    job: Job, store: PartStore, files: Iterable[Item | Stream], console: Console, engine: Engine, totals: Totals
) -> set[Place]:
    number, of = job.shard
    # The other shards' parts are not this one's to judge.
    store.known = {place: part for place, part in store.known.items() if place[0] % of == number}
    seen = set[Place]()

    def skipped(part: Part) -> None:
        seen.add(part.place)
        totals.add(part, before=True)

    mine = (unit for unit in units(files, job.part_rows) if unit.number % of == number)
    if of == 1 and not any(map(is_url, job.sources)):
        threading.Thread(target=_count, args=(job.sources, totals), daemon=True).start()
    for part in engine(job, store, pending(mine, store, skipped), skipped):
        store.known[part.place] = part
        seen.add(part.place)
        totals.add(part)
        console.progress(f"scoring  {totals.bad} anomalous", totals.rows, totals.expected)
    store.refuse_stale(seen)
    return seen


def _count(sources: Sequence[str], totals: Totals) -> None:
    """Count the images beside the work, for the time left; not those in archives, as that would be reading them."""
    images = 0
    with suppress(DataError):  # said by the run itself
        for file in walk_all(sources):
            if isinstance(file, Stream):
                return
            images += 1
        totals.expected = images


def _print(job: Job, files: Iterable[Item | Stream], console: Console, totals: Totals, visit: Visit | None) -> None:
    predictor, pictures = _loaded(job), job.pictures
    images = chain.from_iterable(file.items() for file in files)
    results = predictor.predict(images, pictures.wants_maps, bool(pictures.overlays), job.class_name, job.is_live)
    if job.on_stdout == ".csv":
        console.result(csv_header())
    for number, result in enumerate(results):
        save_pictures(result, pictures, 0, number)
        totals.rows += 1
        totals.bad += bool(result.is_anomaly)
        totals.errors += bool(result.error)
        row = result.row()
        line = encode([row], job.on_stdout).decode().rstrip("\r\n") if job.on_stdout else say_result(result)
        console.result(line)
        if visit is not None:
            visit(row)
        if job.is_endless and totals.fails(job.fail_on):
            break


def say_result(result: Result) -> str:
    """One line for one image."""
    if result.error:
        return f"ERROR    {result.error}"
    word = "ANOMALY" if result.is_anomaly else result.answer
    kind = f"{result.class_name}{' (no class I know)' if result.unknown_class else ''}"
    regions = f"  {counted(len(result.regions), 'region')}" if result.regions else ""
    numbers = f"score {result.score:9.3f}  severity {result.severity:6.2f}  p {result.p_value:.4f}"
    return f"{word:<8} {numbers}  {kind}{regions}  {result.path}"


def say_totals(totals: Totals, out: str) -> str:
    """The last line of a run."""
    before = f" ({totals.before} of them by an earlier run)" if totals.before else ""
    where = f"; {out}" if out[:1] not in ("", "-") else ""
    several = f"; {totals.several} files hold several pictures: the first of each was read" if totals.several else ""
    counts = f"{totals.bad} anomalous, {totals.errors} could not be read"
    return f"{counted(totals.rows, 'image')}{before}: {counts}{where}{several}"
