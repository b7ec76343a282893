"""The inspection log in SQLite: everything it must do anywhere, and what a file can do to it."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from log_cases import CASES, row

from twinspect.errors import ConfigError
from twinspect.server.log import Filter, InspectionLog, LogError, database_url, inspections


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_sqlite(case, log: InspectionLog) -> None:
    case(log)


def test_rows_outlive_the_process(tmp_path) -> None:
    path = str(tmp_path / "log.db")
    first = InspectionLog(path)
    first.append([row()])
    first.close()
    second = InspectionLog(f"sqlite:///{path}", create=False)
    assert len(second.query(Filter())) == 1
    second.close()


def test_a_full_disk_is_said_nothing_half_is_kept_and_the_log_works_again(log: InspectionLog) -> None:
    limits: list[int] = [40]

    def shrink(connection, _record, _proxy=None) -> None:
        connection.execute(f"PRAGMA max_page_count={limits[0]}")

    sa.event.listen(log._engine, "checkout", shrink)
    kept = 0

    def fill() -> None:
        nonlocal kept
        for _ in range(1000):
            log.append([row(name="x" * 200) for _ in range(10)])
            kept += 10

    with pytest.raises(LogError, match="full") as found:
        fill()
    assert (found.value.status, found.value.code) == (507, "log_full")
    assert len(log.query(Filter(limit=500))) == kept
    limits[0] = 100_000
    assert len(log.append([row()])) == 1


def test_other_files_are_refused(tmp_path) -> None:
    junk = tmp_path / "junk.db"
    junk.write_bytes(b"this is no database at all" * 100)
    with pytest.raises(LogError, match="not a database"):
        InspectionLog(str(junk))
    with pytest.raises(LogError, match="cannot be used"):
        InspectionLog(str(tmp_path / "no" / "such" / "folder.db"))
    (tmp_path / "empty.db").touch()
    with pytest.raises(LogError, match="it has no table twinspect_inspections, so it is the log of no server"):
        InspectionLog(str(tmp_path / "empty.db"), create=False)
    with pytest.raises(LogError, match="no such inspection log"):
        InspectionLog(str(tmp_path / "none.db"), create=False)
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize("url", ["mysql+nodriver://x/y", "nonsense://x/y", "://x"])
def test_urls_that_cannot_be_understood_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="--log"):
        InspectionLog(url)


def test_passwords_are_never_shown() -> None:
    url = database_url("postgresql://inspector:secret-word@db.example/log")
    assert url.drivername == "postgresql+psycopg"
    with pytest.raises(LogError) as found:
        InspectionLog("postgresql://inspector:secret-word@127.0.0.1:1/log")
    assert "secret-word" not in str(found.value)
    assert "inspector:***@127.0.0.1:1" in str(found.value)


def test_every_filter_reaches_sql_as_a_bound_value() -> None:
    nasty = "'; DROP TABLE x; --"
    wanted = Filter(1, 2, nasty, nasty, "good", nasty, "missed", nasty, 9)
    text = str(sa.select(inspections.c.id).where(*wanted.conditions()))
    assert "DROP" not in text
    assert text.count(":") >= 9
