"""The inspection log: every decision as a row, kept in SQLite or PostgreSQL, with the operator's word on it.

A row has the file's name as it was given, its hash, scores and the answer. No image content is kept, but for small
pictures in a table of their own where the server is told to. All values reach SQL as bound parameters.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import Query
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from twinspect.decide.decision import ANOMALY, GOOD, UNSURE
from twinspect.errors import ConfigError, TwinspectError, unknown_name
from twinspect.inference.regions import Region
from twinspect.inference.result import Result, columns, finite

SCHEMA = 1  # of the tables; another number in a file means another version of the library wrote it
FALSE_ALARM, MISSED, CONFIRMED = "false_alarm", "missed", "confirmed"
FEEDBACK = (FALSE_ALARM, MISSED, CONFIRMED)
MOST_ROWS = 500  # of one query
MOST = 2**63 - 1  # of a number that a database takes
Text = Annotated[str, Query(max_length=200)]
ClassName = Annotated[str, Query(alias="class", max_length=200)]
Moment = Annotated[int | None, Query(ge=0, le=MOST, description="UTC, milliseconds since 1970")]
_DAY_MS = 86_400_000
_LOCK_SECONDS = 5  # how long one writer waits for another before it gives up
_PAGE = 1000
_POSTGRES_DISK_FULL = "53100"  # SQLSTATE

_tables = sa.MetaData()
# SQLite counts up only columns of type INTEGER.
_id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_schema = sa.Table("twinspect_schema", _tables, sa.Column("version", sa.Integer, nullable=False))
_COLUMN_TYPES: dict[str, sa.types.TypeEngine[Any]] = {
    "string": sa.String(200), "double": sa.Double(), "bool": sa.Boolean(), "int32": sa.Integer(),
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
    sa.Column("bundle", sa.String(200), nullable=False),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("image_key", sa.String(64), nullable=False),
    sa.Column("session", sa.String(200), nullable=False),
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


class LogError(TwinspectError):
    """The inspection log cannot be opened, read or written; ``full`` says that there is no space left."""

    def __init__(self, message: str, full: bool = False) -> None:
        super().__init__(message)
        self.full = full


class NoSuchRow(TwinspectError):
    """The log holds no row of this number."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """One decision to be kept, of a model served under the name ``bundle``.

    Attributes:
        image_key: `image_id` of the file, by which calibration recognises copies and training images.
        session: shift, batch or physical object, as the client says; may be empty.
        at_ms: UTC, milliseconds since 1970; 0 is now.
        picture: JPEG to be kept with it; empty: none.
    """

    result: Result
    image_key: str
    bundle: str
    request_id: str
    session: str = ""
    at_ms: int = 0
    picture: bytes = b""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which rows are asked for, also as parameters of the log's address; empty or None means any.

    Attributes:
        since_ms, until_ms: half-open interval of time.
        bundle, class_name, answer, session: equal to.
        feedback: one of ``FEEDBACK``, or ``none`` for rows without.
        name: part of the file's name, any case.
        before: rows with smaller numbers only (the next page).
        limit: most rows.
    """

    since_ms: Moment = None
    until_ms: Moment = None
    bundle: Text = ""
    class_name: ClassName = ""
    answer: Text = ""
    session: Text = ""
    feedback: Text = ""
    name: Text = ""
    before: Annotated[int | None, Query(ge=1, le=MOST)] = None
    limit: Annotated[int, Query(ge=1, le=MOST_ROWS)] = 50

    def __post_init__(self) -> None:
        if self.answer not in ("", GOOD, UNSURE, ANOMALY):
            raise ConfigError(unknown_name("answer", self.answer, (GOOD, UNSURE, ANOMALY)))
        if self.feedback not in ("", "none", *FEEDBACK):
            raise ConfigError(unknown_name("feedback", self.feedback, ("none", *FEEDBACK)))
        if not 1 <= self.limit <= MOST_ROWS:
            raise ConfigError(f"limit {self.limit}: accepted 1 to {MOST_ROWS}; ask for the next page with before")

    def conditions(self) -> list[sa.ColumnElement[bool]]:
        """SQL conditions with bound values."""
        column = inspections.c
        conditions: list[sa.ColumnElement[bool]] = []
        if self.since_ms is not None:
            conditions.append(column.at_ms >= self.since_ms)
        if self.until_ms is not None:
            conditions.append(column.at_ms < self.until_ms)
        if self.before is not None:
            conditions.append(column.id < self.before)
        for name in ("bundle", "class_name", "answer", "session"):
            if getattr(self, name):
                conditions.append(column[name] == plain_text(getattr(self, name), 200))
        if self.feedback:
            conditions.append(column.feedback == ("" if self.feedback == "none" else self.feedback))
        if self.name:
            conditions.append(column.name.icontains(plain_text(self.name, 200), autoescape=True))
        return conditions


class InspectionLog:
    """A log of decisions. Safe to use from several threads; methods raise `LogError` where the database is gone.

    Args:
        url: a file's path, or any SQLAlchemy URL (``sqlite:///file.db``, ``postgresql://user:password@host/name``).
        create: make the file and the tables where there are none.
    """

    def __init__(self, url: str, create: bool = True) -> None:
        parsed = database_url(url)
        self.described = parsed.render_as_string(hide_password=True)
        file = parsed.database if parsed.get_backend_name() == "sqlite" else None
        if not create and file is not None and not Path(file).is_file():
            raise LogError(f"no such inspection log: {file}. Make one with: twinspect serve BUNDLE --log {file}")
        try:
            self._engine = sa.create_engine(parsed, pool_pre_ping=True, hide_parameters=True)
        except (NoSuchModuleError, ImportError) as error:
            raise ConfigError(f"--log {self.described}: {error}; accepted sqlite or postgresql") from None
        if parsed.get_backend_name() == "sqlite":
            sa.event.listen(self._engine, "connect", _prepare_sqlite)
        with self._transaction() as connection:
            if create:
                connection.exec_driver_sql(_ALONE.get(parsed.get_backend_name(), "SELECT 1"))
                _tables.create_all(connection)
            versions = connection.execute(sa.select(_schema.c.version)).scalars().all()
            if create and not versions:
                connection.execute(_schema.insert(), {"version": SCHEMA})
            if list(versions) == [SCHEMA]:
                _add_columns(connection)
        if versions and list(versions) != [SCHEMA]:
            raise LogError(
                f"{self.described} has tables of version {versions[0]}, this library reads version {SCHEMA}; "
                "name another file or database with --log"
            )

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        """All of it or nothing; an error of the database becomes one line without SQL and without values."""
        try:
            with self._engine.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            cause = getattr(error, "orig", None) or error
            lines = str(cause).strip().splitlines() or [repr(cause)]
            full = "disk is full" in lines[0] or getattr(cause, "sqlstate", None) == _POSTGRES_DISK_FULL
            raise LogError(f"the inspection log {self.described} cannot be used: {lines[0]}", full) from None

    def append(self, rows: Sequence[Inspection]) -> list[int]:
        """Keep decisions in one transaction, all of them or none; their numbers, in order."""
        statement = sa.insert(inspections).returning(inspections.c.id, sort_by_parameter_order=True)
        with self._transaction() as connection:
            numbers = list(connection.execute(statement, [_values(one) for one in rows]).scalars().all())
            pairs = zip(numbers, rows, strict=True)
            if pictures := [{"id": number, "jpeg": one.picture} for number, one in pairs if one.picture]:
                connection.execute(sa.insert(_pictures), pictures)
        return numbers

    def picture(self, number: int) -> bytes:
        """The JPEG that was kept of a decision.

        Raises:
            NoSuchRow: none was.
        """
        with self._transaction() as connection:
            jpeg = connection.execute(sa.select(_pictures.c.jpeg).where(_pictures.c.id == number)).scalar()
        if jpeg is None:
            raise NoSuchRow(f"the log holds no picture of decision {number}; serve --log-thumbnails 320 keeps them")
        return bytes(jpeg)

    def query(self, wanted: Filter) -> list[dict[str, Any]]:
        """Rows as plain values, latest first."""
        statement = sa.select(inspections, _has_picture).where(*wanted.conditions())
        with self._transaction() as connection:
            rows = connection.execute(statement.order_by(inspections.c.id.desc()).limit(wanted.limit))
            return [_row(row) for row in rows.mappings()]

    def scan(self, model_id: str, since_ms: int | None = None) -> Iterator[dict[str, Any]]:
        """All rows of a model, oldest first, a page at a time."""
        last = 0
        conditions = [inspections.c.model_id == model_id, *Filter(since_ms=since_ms).conditions()]
        while True:
            statement = sa.select(inspections).where(inspections.c.id > last, *conditions)
            with self._transaction() as connection:
                rows = connection.execute(statement.order_by(inspections.c.id).limit(_PAGE)).mappings().all()
            if not rows:
                return
            yield from (_row(one) for one in rows)
            last = int(rows[-1]["id"])

    def give_feedback(self, number: int, verdict: str, note: str = "") -> dict[str, Any]:
        """Keep the operator's word on a decision, and return its row; an empty verdict takes it back.

        Raises:
            ConfigError: an unknown verdict, or one that contradicts the answer.
            NoSuchRow: no such row.
        """
        if verdict not in ("", *FEEDBACK):
            raise ConfigError(unknown_name("feedback", verdict, FEEDBACK))
        change = {
            "feedback": verdict,
            "feedback_at_ms": int(time.time() * 1000) if verdict else None,
            "note": plain_text(note, 500),
        }
        here = inspections.c.id == number
        with self._transaction() as connection:
            row = connection.execute(sa.select(inspections, _has_picture).where(here)).mappings().first()
            if row is None:
                raise NoSuchRow(f"the log holds no decision number {number}")
            _refuse_contradiction(row, verdict)
            connection.execute(sa.update(inspections).where(here).values(change))
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


def plain_text(text: str, length: int) -> str:
    """Text that every database takes: no control characters, no half characters, cut to a length."""
    whole = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(c if c.isprintable() else " " for c in whole).strip()[:length]


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={_LOCK_SECONDS * 1000}")
    # Readers do not wait for the writer; a crash of the machine may lose the last rows, never the file.
    latest = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError:  # another process makes the same file: SQLite does not wait here by itself
            if time.monotonic() > latest:
                raise
            time.sleep(0.05)
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


def _add_columns(connection: sa.Connection) -> None:
    """Give the table of an older version the columns that results have now; its rows know nothing there."""
    present = {column["name"] for column in sa.inspect(connection).get_columns(inspections.name)}
    for column in inspections.c:
        if column.name not in present:
            definition = sa.schema.CreateColumn(column).compile(dialect=connection.dialect)
            connection.execute(sa.text(f"ALTER TABLE {inspections.name} ADD COLUMN {definition}"))


def _values(one: Inspection) -> dict[str, Any]:
    row = one.result.row()
    values = {c.name: plain_text(row[c.name], 200) if c.kind == "string" else finite(row[c.name]) for c in _RESULT}
    texts = {"name": one.result.path, "bundle": one.bundle, "session": one.session}
    return {
        **values,
        **{name: plain_text(text, 200) for name, text in texts.items()},
        "n_regions": row["n_regions"],
        "at_ms": one.at_ms or int(time.time() * 1000),
        "request_id": one.request_id,
        "image_key": one.image_key,
    }


def _row(columns: Mapping[Any, Any]) -> dict[str, Any]:
    """A row as the server gives it: what was kept, and what follows from it as in `Result`."""
    row: dict[str, Any] = {str(k): bool(v) if k == "picture" else v for k, v in columns.items()}
    known = {c.name: row[c.name] for c in _RESULT if row[c.name] is not None and c.kind != "regions"}
    result = Result(row["name"], regions=[Region(**one) for one in json.loads(row["regions"])], **known)
    return {**row, **result.answer_row()}


def _refuse_contradiction(row: Mapping[Any, Any], verdict: str) -> None:
    wrong = {FALSE_ALARM: GOOD, MISSED: ANOMALY}.get(verdict)
    if wrong is not None and row["answer"] == wrong:
        raise ConfigError(
            f"decision {row['id']} was {row['answer']!r}, which {verdict!r} contradicts; accepted "
            f"{CONFIRMED!r} or {MISSED if wrong == GOOD else FALSE_ALARM!r}"
        )
