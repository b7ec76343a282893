"""The inspection log: every decision as a row, kept in SQLite or PostgreSQL, with the operator's word on it.

A row has the file's name as it was given, its hash, scores and the answer. No image content is kept, but for small
pictures in a table of their own where the server is told to. All values reach SQL as bound parameters.

`learn` makes calibration images of the rows. Good are images that were called good and not reported as missed, and
false alarms. Bad are reported misses and confirmed alarms. An alarm without feedback is neither: it is left out, and
counted, because leaving out good images with high scores makes thresholds too low.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import sqlalchemy as sa
from fastapi import Query
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, NoSuchTableError, SQLAlchemyError

from twinspect.decide.decision import ANOMALY, GOOD, UNSURE, Decision, GoodScores
from twinspect.decide.recalibrate import Scored
from twinspect.errors import ConfigError, DataError
from twinspect.inference.regions import Region
from twinspect.inference.result import Result, columns
from twinspect.server import Refused

Verdict = Literal["false_alarm", "missed", "confirmed"]
FALSE_ALARM, MISSED, CONFIRMED = get_args(Verdict)
MOST = 2**63 - 1  # of a number that a database takes
MOST_TEXT = 200  # characters of a name
Text = Annotated[str, Query(max_length=MOST_TEXT)]
ClassName = Annotated[str, Query(alias="class", max_length=MOST_TEXT)]
Moment = Annotated[int | None, Query(ge=0, le=MOST, description="UTC, milliseconds since 1970")]
_DAY_MS = 86_400_000
_LOCK_SECONDS = 5  # as long as Python's sqlite3 lets one writer wait for another
_PAGE = 1000
_POSTGRES_DISK_FULL = "53100"  # SQLSTATE

_tables = sa.MetaData()
# SQLite counts up only columns of type INTEGER.
_id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_COLUMN_TYPES: dict[str, sa.types.TypeEngine[Any]] = {
    "string": sa.String(MOST_TEXT), "double": sa.Double(), "bool": sa.Boolean(), "int32": sa.Integer(),
    "int64": sa.BigInteger(), "regions": sa.Text(),
}  # fmt: skip
# What a row keeps of its result; the path is in ``name``, and other columns follow from these.
_RESULT = [c for c in columns() if not (c.tables_only or c.derived or c.name == "path")]
inspections = sa.Table(
    "twinspect_inspections",
    _tables,
    sa.Column("id", _id, primary_key=True, autoincrement=True),
    sa.Column("at_ms", sa.BigInteger, nullable=False),  # UTC, milliseconds since 1970
    sa.Column("request_id", sa.String(64), nullable=False),
    sa.Column("bundle", sa.String(MOST_TEXT), nullable=False),
    sa.Column("name", sa.String(MOST_TEXT), nullable=False),
    sa.Column("image_key", sa.String(64), nullable=False),
    sa.Column("session", sa.String(MOST_TEXT), nullable=False),
    *(sa.Column(c.name, _COLUMN_TYPES[c.kind], nullable=True) for c in _RESULT),
    sa.Column("n_regions", sa.Integer, nullable=False),  # derived, but tables of version 0.2 insist on it
    sa.Column("feedback", sa.String(16), nullable=False, server_default=""),
    sa.Column("feedback_at_ms", sa.BigInteger, nullable=True),
    sa.Column("note", sa.String(500), nullable=False, server_default=""),
    sa.Index("twinspect_inspections_at", "at_ms"),
    sa.Index("twinspect_inspections_class", "class_name", "id"),
    sa.Index("twinspect_inspections_answer", "answer", "id"),
    sa.Index("twinspect_inspections_feedback", "feedback", "id"),
)
_pictures = sa.Table(
    "twinspect_pictures",
    _tables,
    sa.Column("id", _id, primary_key=True, autoincrement=False),  # of the inspection
    sa.Column("jpeg", sa.LargeBinary, nullable=False),
)
_has_picture = sa.exists().where(_pictures.c.id == inspections.c.id).label("picture")

# Two servers that start on one new log would both make its tables.
_ALONE = {"sqlite": "BEGIN IMMEDIATE", "postgresql": "SELECT pg_advisory_xact_lock(8731)"}


class LogError(Refused):
    """The inspection log cannot be opened, read or written; ``full``: because there is no space left."""

    def __init__(self, message: str, full: bool = False) -> None:
        super().__init__(*((507, "log_full") if full else (503, "log_unavailable")), message)


@dataclass(frozen=True, slots=True)
class Inspection:
    """One decision to be kept."""

    result: Result
    image_key: str  # `image_id` of the file, by which calibration recognises copies and training images
    bundle: str  # name of the model
    request_id: str
    session: str = ""  # shift, batch or physical object, as the client says
    at_ms: int = 0  # UTC, milliseconds since 1970; 0 is now
    picture: bytes = b""  # JPEG


@dataclass(frozen=True, slots=True)
class Filter:
    """Which rows are asked for, also as parameters of the log's address; empty or None means any."""

    since_ms: Moment = None
    until_ms: Moment = None
    bundle: Text = ""
    class_name: ClassName = ""
    answer: Literal["", "good", "unsure", "anomaly"] = ""
    session: Text = ""
    feedback: Literal["", "none", Verdict] = ""
    name: Annotated[str, Query(max_length=MOST_TEXT, description="Part of the file's name, any case")] = ""
    before: Annotated[int | None, Query(ge=1, le=MOST, description="Smaller ids only: the next page")] = None
    limit: Annotated[int, Query(ge=1, le=500)] = 50

    def conditions(self) -> list[sa.ColumnElement[bool]]:
        """SQL conditions with bound values."""
        column = inspections.c
        conditions = {
            "bundle": column.bundle == plain_text(self.bundle),
            "class_name": column.class_name == plain_text(self.class_name),
            "answer": column.answer == self.answer,
            "session": column.session == plain_text(self.session),
            "since_ms": column.at_ms >= (self.since_ms or 0),
            "until_ms": column.at_ms < (self.until_ms or 0),
            "before": column.id < (self.before or 0),
            "feedback": column.feedback == ("" if self.feedback == "none" else self.feedback),
            "name": column.name.icontains(plain_text(self.name), autoescape=True),
        }
        return [condition for name, condition in conditions.items() if getattr(self, name) not in ("", None)]


class InspectionLog:
    """A log of decisions. Safe to use from several threads; methods raise `LogError` where the database is gone.

    ``url`` is a file's path, or any SQLAlchemy URL (``sqlite:///file.db``, ``postgresql://user:password@host/name``);
    ``create`` makes the file and the tables where there are none.
    """

    def __init__(self, url: str, create: bool = True) -> None:
        parsed = database_url(url)
        kind, file = parsed.get_backend_name(), parsed.database
        self.described = parsed.render_as_string(hide_password=True)
        if not create and kind == "sqlite" and not Path(file or "").is_file():
            raise LogError(f"no such inspection log: {file}. Make one with: twinspect serve MODEL --log {file}")
        try:
            self._engine = sa.create_engine(parsed, pool_pre_ping=True, hide_parameters=True)
        except (NoSuchModuleError, ImportError) as error:
            raise ConfigError(f"--log {self.described}: {error}; accepted sqlite or postgresql") from None
        if kind == "sqlite":
            sa.event.listen(self._engine, "connect", _prepare_sqlite)
        try:
            with self._transaction() as connection:
                if create:
                    connection.exec_driver_sql(_ALONE.get(kind, "SELECT 1"))
                    _tables.create_all(connection)
                _add_columns(connection)
        except LogError:
            self.close()
            raise

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        """All of it or nothing; an error of the database becomes one line without SQL and without values."""
        try:
            with self._engine.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            cause = getattr(error, "orig", None) or error
            lines = str(cause).strip().splitlines() or [repr(cause)]
            if isinstance(error, NoSuchTableError):
                lines = [f"it has no table {lines[0]}, so it is the log of no server"]
            full = "disk is full" in lines[0] or getattr(cause, "sqlstate", None) == _POSTGRES_DISK_FULL
            raise LogError(f"the inspection log {self.described} cannot be used: {lines[0]}", full) from None

    def append(self, rows: Sequence[Inspection]) -> list[int]:
        """Keep decisions in one transaction, all of them or none; their numbers, in order."""
        statement = sa.insert(inspections).returning(inspections.c.id, sort_by_parameter_order=True)
        with self._transaction() as connection:
            numbers = list(connection.execute(statement, [_values(row) for row in rows]).scalars().all())
            pairs = zip(numbers, rows, strict=True)
            if pictures := [{"id": number, "jpeg": row.picture} for number, row in pairs if row.picture]:
                connection.execute(sa.insert(_pictures), pictures)
        return numbers

    def picture(self, number: int) -> bytes:
        """The JPEG that was kept of a decision."""
        with self._transaction() as connection:
            jpeg = connection.execute(sa.select(_pictures.c.jpeg).where(_pictures.c.id == number)).scalar()
        if jpeg is None:
            raise Refused(
                404, "no_such_row",
                f"the log holds no picture of decision {number}; serve --log-thumbnails 320 keeps them",
            )  # fmt: skip
        return bytes(jpeg)

    def query(self, selection: Filter) -> list[dict[str, Any]]:
        """Rows as plain values, latest first."""
        statement = sa.select(inspections, _has_picture).where(*selection.conditions())
        with self._transaction() as connection:
            rows = connection.execute(statement.order_by(inspections.c.id.desc()).limit(selection.limit))
            return [_row(row) for row in rows.mappings()]

    def scan(self, model_id: str, since_ms: int | None = None) -> Iterator[Mapping[Any, Any]]:
        """All rows of a model as they were kept, oldest first, read while they are used."""
        conditions = (inspections.c.model_id == model_id, *Filter(since_ms=since_ms).conditions())
        statement = sa.select(inspections).where(*conditions).order_by(inspections.c.id)
        with self._transaction() as connection:
            yield from connection.execute(statement.execution_options(yield_per=_PAGE)).mappings()

    def give_feedback(self, number: int, verdict: Literal["", Verdict], note: str = "") -> dict[str, Any]:
        """Keep the operator's word on a decision, and return its row; an empty verdict takes it back.

        A verdict that contradicts the answer is refused (ConfigError).
        """
        at_ms = int(time.time() * 1000) if verdict else None
        change = {"feedback": verdict, "feedback_at_ms": at_ms, "note": plain_text(note, 500)}
        by_number = inspections.c.id == number
        with self._transaction() as connection:
            row = connection.execute(sa.select(inspections, _has_picture).where(by_number)).mappings().first()
            if row is None:
                raise Refused(404, "no_such_row", f"the log holds no decision number {number}")
            wrong = {FALSE_ALARM: GOOD, MISSED: ANOMALY}.get(verdict)
            if wrong is not None and row["answer"] == wrong:
                other = MISSED if wrong == GOOD else FALSE_ALARM
                raise ConfigError(
                    f"decision {number} was {wrong!r}, which {verdict!r} contradicts; "
                    f"accepted {CONFIRMED!r} or {other!r}"
                )
            connection.execute(sa.update(inspections).where(by_number).values(change))
        return _row({**row, **change})

    def prune(self, days: float) -> int:
        """Delete rows older than so many days; how many there were."""
        oldest = int(time.time() * 1000 - days * _DAY_MS)
        old = inspections.c.at_ms < oldest
        with self._transaction() as connection:
            connection.execute(sa.delete(_pictures).where(_pictures.c.id.in_(sa.select(inspections.c.id).where(old))))
            return int(connection.execute(sa.delete(inspections).where(old)).rowcount)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


def database_url(text: str) -> sa.URL:
    """A path or URL to an SQLAlchemy URL with the driver this project installs."""
    if "://" not in text:
        return sa.URL.create("sqlite", database=str(Path(text)))
    try:
        url = sa.make_url(text)
    except (ArgumentError, ValueError):
        raise ConfigError(
            "--log: not a database URL; accepted a file name, sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"
        ) from None
    return url.set(drivername="postgresql+psycopg") if url.drivername in ("postgresql", "postgres") else url


def plain_text(text: str, length: int = MOST_TEXT) -> str:
    """Text that every database takes: no control characters, no half characters, cut to a length."""
    whole = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(c if c.isprintable() else " " for c in whole).strip()[:length]


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # Readers do not wait for the writer; a crash of the machine may lose the last rows, never the file.
    latest = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError:  # another process makes the same file: SQLite does not wait here by itself
            if time.monotonic() > latest:
                raise
            time.sleep(0.05)
    connection.execute("PRAGMA synchronous=NORMAL")


def _add_columns(connection: sa.Connection) -> None:
    """Give the table of an older version the columns that results have now; its rows know nothing there."""
    present = {column["name"] for column in sa.inspect(connection).get_columns(inspections.name)}
    for column in inspections.c:
        if column.name not in present:
            definition = sa.schema.CreateColumn(column).compile(dialect=connection.dialect)
            connection.execute(sa.text(f"ALTER TABLE {inspections.name} ADD COLUMN {definition}"))


def _values(inspection: Inspection) -> dict[str, Any]:
    about = {name: getattr(inspection, name) for name in ("bundle", "request_id", "session", "image_key")}
    result, at_ms = inspection.result, inspection.at_ms or int(time.time() * 1000)
    row = {**result.row(), **about, "name": result.path, "at_ms": at_ms}
    limits = {c.name: getattr(c.type, "length", None) for c in inspections.c if c.name in row}
    return {name: plain_text(row[name], limit) if limit else row[name] for name, limit in limits.items()}


def _row(columns: Mapping[Any, Any]) -> dict[str, Any]:
    """A row as the server gives it: what was kept, and what follows from it as in `Result`."""
    row: dict[str, Any] = {str(k): bool(v) if k == "picture" else v for k, v in columns.items()}
    known = {c.name: row[c.name] for c in _RESULT if row[c.name] is not None and c.kind != "regions"}
    result = Result(row["name"], regions=[Region(**region) for region in json.loads(row["regions"])], **known)
    return {**row, **result.answer_row()}


def learn(
    log: InspectionLog, decision: Decision, since: str = "", class_name: str | None = None
) -> tuple[Scored, Scored, list[str]]:
    """Good images of a log, good and bad ones, and notes on what was left out; no picture is looked at again.

    Rows of other models than the decision's are left out, as their scores cannot be compared, and those from before
    ``since``, an ISO date or time (local where it names no zone). A DataError where no good image is left.
    """
    decision.checked_class(class_name)
    labelled: dict[int | None, list[Mapping[Any, Any]]] = {0: [], 1: [], None: []}
    for row in log.scan(decision.model_id, milliseconds(since)):
        if class_name in (None, row["class_name"]) and row["score"] is not None:
            labelled[label_of(row["answer"], row["feedback"])].append(row)
    good, bad, unknown = labelled[0], labelled[1], len(labelled[None])
    if not good:
        raise DataError(
            f"{log.described} holds no good image of this model (id {decision.model_id}) among "
            f"{len(bad) + unknown} decisions that fit; score some with: twinspect serve MODEL"
        )
    notes = [f"{len(good)} good and {len(bad)} bad images from the log"]
    if unknown:
        points = 100 * unknown / (len(good) + unknown)
        notes.append(
            f"{unknown} alarms without feedback are left out; were all of them false alarms, their rate could be "
            f"up to {points:.2g} percentage points above the promise: give feedback on the page and calibrate again"
        )
    return _scored(good, []), _scored(good, bad), notes


def label_of(answer: str, feedback: str) -> int | None:
    """0 for a good image, 1 for a bad one, None for nobody knows."""
    if feedback == FALSE_ALARM:
        return 0
    if feedback == MISSED:
        return 1
    if answer == GOOD:
        return 0
    return 1 if feedback == CONFIRMED and answer != UNSURE else None


def milliseconds(text: str) -> int | None:
    """An ISO date or time as UTC milliseconds; None for an empty text."""
    if not text:
        return None
    try:
        return int(datetime.fromisoformat(text).timestamp() * 1000)
    except (ValueError, OverflowError, OSError):
        raise ConfigError(f"--since {text!r}: accepted a date or time such as 2026-11-22T06:00") from None


def _scored(good: Sequence[Mapping[Any, Any]], bad: Sequence[Mapping[Any, Any]]) -> Scored:
    rows = [*good, *bad]
    names = ("score", "peak", "cluster_distance", "class_name", "predicted_class", "session", "image_key")
    columns: list[Any] = [[row[name] for row in rows] for name in names]
    labels = np.repeat([0, 1], [len(good), len(bad)])
    return Scored(GoodScores(*columns), tuple(row["name"] for row in rows), labels, ())
