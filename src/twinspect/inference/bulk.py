"""Prediction over large sets: constant memory, a table written in parts, and runs that go on after being killed.

`Scorer` does a `Job` for any units of the input (this process's, or those a Ray actor is given), `run` is the whole
command. No torch import here: the light install runs it too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, count, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from twinspect.data.images import SEVERAL_SUFFIXES, count_pictures
from twinspect.errors import DataError
from twinspect.inference.archives import Item, Stream
from twinspect.inference.decode import DecodePool
from twinspect.inference.job import Job, Unit, units
from twinspect.inference.parts import Part, PartStore, Place, digest, source_digest
from twinspect.inference.pictures import coco_line, save_pictures, write_coco
from twinspect.inference.predictor import Predictor
from twinspect.inference.result import Result, counted
from twinspect.inference.sources import walk_all, watch
from twinspect.inference.stores import is_url
from twinspect.inference.table import as_line, csv_header, encode, join, read_rows

_LOOKED_INTO = 200  # files that are opened before the work, to find out whether they hold several pictures


class Listener(Protocol):
    """Who is told how a run goes."""

    def result(self, text: str) -> None:
        """One line of the answer."""

    def progress(self, stage: str, done: int, total: int) -> None:
        """``done`` of ``total`` images; total 0 is not known yet."""


class Tag(NamedTuple):
    """Where an image's row belongs: unit, part of it, place in the unit; whether the part, the unit end with it.

    ``source`` and ``image`` are the identities of unit and image when they were listed.
    """

    unit: int
    sub: int
    number: int
    last: bool
    end: bool
    source: str
    image: str


@dataclass(slots=True)
class Totals:
    """Images so far: all, anomalous, unreadable, and how many of them an earlier run had done.

    ``several`` counts files that hold several pictures, such as TIFFs of many pages, among the first ones.
    """

    rows: int = 0
    bad: int = 0
    errors: int = 0
    before: int = 0
    several: int = 0

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


class UnitScorer:
    """One loaded model with its decoders. A context.

    Args:
        job: what to run.
        store: where parts go; its ``known`` parts are not done again.
    """

    def __init__(self, job: Job, store: PartStore | None = None) -> None:
        from twinspect.inference.runtimes import load_predictor

        self.job, self.store = job, store
        self.predictor: Predictor = load_predictor(
            job.model, job.runtime, job.threads, job.batch, job.weights, job.device
        )
        self.predictor.decision.checked_class(job.class_name)
        workers, size = job.decoders, self.predictor.runtime.size
        self.pool = DecodePool(
            size, self.predictor.limits, bool(job.pictures.overlays), workers or self.predictor.workers, workers > 0,
            self.predictor.batch, self.predictor.decision.tiles,
        )  # fmt: skip

    def __enter__(self) -> UnitScorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.__exit__()

    def results(self, units: Iterable[Unit], skipped: Callable[[Part], None]) -> Iterator[tuple[Tag, Result]]:
        """Images of units scored in order, pictures written. A batch never holds images of two parts.

        Args:
            units: of the input.
            skipped: told of every part that an earlier run had done.
        """
        wants, class_name = self.job.pictures.wants_maps, self.job.class_name
        tagged = (pair for unit in units for pair in self._tagged(unit, skipped))
        for _, part in groupby(self.pool.stream(tagged), key=lambda pair: (pair[0].unit, pair[0].sub)):
            while batch := list(islice(part, self.predictor.batch)):
                images = [image for _, image in batch]
                results = self.predictor.score_batch(images, wants, [class_name] * len(batch))
                for (tag, _), result in zip(batch, results, strict=True):
                    save_pictures(result, self.job.pictures, tag.unit, tag.number)
                    yield tag, result

    def live(self, files: Iterable[Item | Stream]) -> Iterator[Result]:
        """Images scored one by one, each before the next is asked for, pictures written."""
        pictures, items = self.job.pictures, chain.from_iterable(file.items() for file in files)
        results = self.predictor.predict(
            items, pictures.wants_maps, bool(pictures.overlays), self.job.class_name, live=True
        )
        for number, result in enumerate(results):
            save_pictures(result, pictures, 0, number)
            yield result

    def parts(self, units: Iterable[Unit], skipped: Callable[[Part], None]) -> Iterator[Part]:
        """Score units and keep their rows; a part is given when it is safely stored."""
        rows, lines, images = list[dict[str, Any]](), list[bytes](), list[str]()
        for tag, result in self.results(units, skipped):
            rows.append(result.row())
            images.append(tag.image)
            lines += [coco_line(result)] if self.job.pictures.coco else []
            if tag.last:
                aside = b"".join(lines) if self.job.pictures.coco else None
                yield self._stored(tag, rows, digest(tag.source, images), aside)
                rows, lines, images = [], [], []

    def _stored(self, tag: Tag, rows: list[dict[str, Any]], key: str, aside: bytes | None) -> Part:
        assert self.store is not None
        bad, errors = sum(bool(row["is_anomaly"]) for row in rows), sum(bool(row["error"]) for row in rows)
        part = Part(tag.unit, tag.sub, len(rows), bad, errors, key, tag.end, self.store.suffix)
        self.store.put(part, encode(rows, part.suffix), aside)
        return part

    def _tagged(self, unit: Unit, skipped: Callable[[Part], None]) -> Iterator[tuple[Tag, Item]]:
        """A unit's images with their places, without those of parts that are there."""
        images, number, source = _with_end(unit.images()), 0, unit.identity
        for sub in count():
            end = True  # should nothing follow
            known = self.store.known.get((unit.number, sub)) if self.store is not None else None
            chunk, done = islice(images, self.job.part_rows), list[str]()
            for place, (item, end) in enumerate(chunk, start=1):
                if known is None:
                    last = end or place == self.job.part_rows
                    yield Tag(unit.number, sub, number, last, end, source, item.identity), item
                else:
                    done.append(item.identity)
                number += 1
            if known is not None and self.store is not None:
                self.store.check(known, digest(source, done))
                skipped(known)
            if end:
                return


def _with_end(items: Iterator[Item]) -> Iterator[tuple[Item, bool]]:
    held = next(items, None)
    while held is not None:
        following = next(items, None)
        yield held, following is None
        held = following


def pending(units: Iterable[Unit], store: PartStore, skipped: Callable[[Part], None]) -> Iterator[Unit]:
    """Units that are not finished. Parts of finished ones are checked against their source and told of.

    Raises:
        DataError: the input is not that of the parts there are.
    """
    for unit in units:
        done = store.of_unit(unit.number)
        if not (done and done[-1].end):
            yield unit
            continue
        if isinstance(unit.content, Stream):
            expected = source_digest(unit.identity)
        else:
            expected = digest("", (item.identity for item in unit.content))
        for part in done:
            store.check(part, expected)
            skipped(part)


# Who scores units: told of the job, the store, the units, and whom to tell of parts that were there already.
Engine = Callable[[Job, PartStore, Iterator[Unit], Callable[[Part], None]], Iterator[Part]]


def run(
    job: Job,
    listener: Listener,
    engine: Engine | None = None,
    visit: Callable[[dict[str, Any]], None] | None = None,
) -> Totals:
    """The whole command: score what is not scored yet, make the table, say what came out.

    Args:
        job: what to run.
        listener: told of progress and results.
        engine: who scores the units; None is this process.
        visit: called with every row, once all are there where a table is written.

    Raises:
        ConfigError, DataError, BundleError: of the job, its sources or its model.
        TwinspectError: something cannot be written.
    """
    totals = Totals()
    # An empty source is refused before the model is loaded.
    files = _counting_several(watch(*job.sources) if job.watch else walk_all(job.sources), totals)
    job.check_outputs()
    if not job.keeps_parts:
        _print(job, files, listener, totals, visit)
        return totals
    label = "" if job.shard[1] == 1 else f"-{job.shard[0]}-of-{job.shard[1]}"
    store, settings = job.store(), job.settings()
    with closing(store.lock(label)):
        store.begin(settings, job.restart)
        seen = _keep_parts(job, store, files, listener, engine or local, totals)
        if job.coco:
            write_coco(lambda: store.asides(seen), Path(job.coco))
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
    job: Job, store: PartStore, files: Iterable[Item | Stream], listener: Listener, engine: Engine, totals: Totals
) -> set[Place]:
    number, of = job.shard
    # The other shards' parts are not this one's to judge.
    store.known = {place: part for place, part in store.known.items() if place[0] % of == number}
    seen = set[Place]()

    def skipped(part: Part) -> None:
        seen.add((part.unit, part.sub))
        totals.add(part, before=True)

    mine = (unit for unit in units(files, job.part_rows) if unit.number % of == number)
    counter = _Counter(job.sources if of == 1 else ())
    for part in engine(job, store, pending(mine, store, skipped), skipped):
        store.known[part.unit, part.sub] = part
        seen.add((part.unit, part.sub))
        totals.add(part)
        listener.progress(f"scoring  {totals.bad} anomalous", totals.rows, counter.total)
    store.refuse_stale(seen)
    return seen


def local(job: Job, store: PartStore, units: Iterator[Unit], skipped: Callable[[Part], None]) -> Iterator[Part]:
    """The engine that is this process."""
    first = next(units, None)
    if first is None:
        return  # everything is there: the model need not be loaded
    with UnitScorer(job, store) as scorer:
        yield from scorer.parts(chain([first], units), skipped)


def _print(
    job: Job,
    files: Iterable[Item | Stream],
    listener: Listener,
    totals: Totals,
    visit: Callable[[dict[str, Any]], None] | None,
) -> None:
    with UnitScorer(job) as scorer:
        if job.on_stdout == ".csv":
            listener.result(csv_header())
        rest = (result for _, result in scorer.results(units(files, job.part_rows), lambda part: None))
        for result in scorer.live(files) if job.is_live else rest:
            totals.rows += 1
            totals.bad += bool(result.is_anomaly)
            totals.errors += bool(result.error)
            listener.result(as_line(result.row(), job.on_stdout) if job.on_stdout else say_result(result))
            if visit is not None:
                visit(result.row())
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
    found = f"{totals.bad} anomalous, {totals.errors} could not be read"
    return f"{counted(totals.rows, 'image')}{before}: {found}{where}{several}"


class _Counter:
    """Counts the images of local sources beside the work, for the time left; ``total`` is 0 until it is known."""

    def __init__(self, sources: Sequence[str]) -> None:
        self.total = 0
        self._sources = sources
        if sources and not any(is_url(source) for source in sources):
            threading.Thread(target=self._count, daemon=True).start()

    def _count(self) -> None:
        total = 0
        try:
            for one in walk_all(self._sources):
                images = one.count()
                if images is None:
                    return
                total += images
        except DataError:  # said by the run itself
            return
        self.total = total
