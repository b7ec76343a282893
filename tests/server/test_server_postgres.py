"""The inspection log in PostgreSQL: a private cluster on a free loopback port, made for this file and thrown away."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from log_cases import CASES, row

from twinspect.server.log import Filter, InspectionLog, LogError

PASSWORD = "for-this-test-only"
_NOBODY = "nobody"  # PostgreSQL refuses to run as root


def programs() -> Path | None:
    """Folder of initdb and postgres; Debian keeps them off the path."""
    found = shutil.which("initdb")
    candidates = [Path(found).resolve().parent] if found else []
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((p for p in candidates if (p / "initdb").exists() and (p / "postgres").exists()), None)


def as_user() -> dict[str, object]:
    """Options for subprocess: another user where this is root."""
    if os.geteuid() != 0:
        return {}
    user = pwd.getpwnam(_NOBODY)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


class Cluster:
    """One PostgreSQL server over a folder; can be stopped and started again."""

    def __init__(self, bin: Path, folder: Path) -> None:
        self.bin, self.folder = bin, folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None
        secret = folder / "password"
        secret.write_text(PASSWORD)
        if os.geteuid() == 0:
            user = pwd.getpwnam(_NOBODY)
            for path in (folder, secret):
                os.chown(path, user.pw_uid, user.pw_gid)
        command = [bin / "initdb", "-D", folder / "data", "-U", "twin", "-A", "scram-sha-256", "--pwfile", secret,
                   "-E", "UTF8", "--locale", "C", "--no-sync"]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, cwd=folder, **as_user())  # type: ignore[call-overload]

    @property
    def url(self) -> str:
        return f"postgresql://twin:{PASSWORD}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = {"listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": "", "fsync": "off"}
        settings = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        with (self.folder / "postgres.log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.bin / "postgres", "-D", self.folder / "data", *settings],
                stdout=log, stderr=log, cwd=self.folder, **as_user(),
            )  # type: ignore[call-overload]  # fmt: skip
        until = time.monotonic() + 30
        while not self.answers():
            assert time.monotonic() < until, (self.folder / "postgres.log").read_text()
            time.sleep(0.1)

    def answers(self) -> bool:
        try:
            InspectionLog(self.url).close()
        except LogError:
            return False
        return True

    def stop(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)  # PostgreSQL's fast stop: connections are cut, data are kept
        self.process.wait(30)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    bin = programs()
    if bin is None:
        pytest.skip("no PostgreSQL on this machine (initdb); type: apt-get install postgresql")
    # Not below pytest's own folder, which other users may not enter.
    with tempfile.TemporaryDirectory(prefix="twinspect-pg-", ignore_cleanup_errors=True) as folder:
        found = Cluster(bin, Path(folder))
        found.start()
        yield found
        found.stop()


@pytest.fixture
def log(cluster: Cluster) -> Iterator[InspectionLog]:
    found = InspectionLog(cluster.url)
    with found._engine.begin() as connection:
        connection.execute(sa.text("TRUNCATE twinspect_inspections RESTART IDENTITY"))
    yield found
    found.close()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_postgres(case, log: InspectionLog) -> None:
    assert log._engine.dialect.name == "postgresql"
    case(log)


def test_a_wrong_password_is_refused_without_showing_it(cluster: Cluster) -> None:
    with pytest.raises(LogError, match="password authentication failed") as found:
        InspectionLog(cluster.url.replace(PASSWORD, "guessed-word"))
    assert "guessed-word" not in str(found.value)


def test_the_database_may_go_away_and_come_back(cluster: Cluster, log: InspectionLog) -> None:
    log.append([row()])
    cluster.stop()
    with pytest.raises(LogError, match="cannot be used") as found:
        log.append([row()])
    assert found.value.code == "log_unavailable"
    cluster.start()
    log.append([row()])
    assert len(log.query(Filter())) == 2


def test_predictions_are_kept_in_it_by_the_server(log: InspectionLog) -> None:
    from serving import BRIGHT, DARK, Running, encoded

    with Running(log=log) as server:
        numbers = [one["log_id"] for one in server.post(encoded(DARK), encoded(BRIGHT)).json["results"]]
        found = server.get("/v1/log?answer=anomaly").json["rows"]
        assert [one["id"] for one in found] == numbers[1:]
        assert server.post_json(f"/v1/log/{numbers[1]}/feedback", {"verdict": "false_alarm"}).status == 200
    assert [one["feedback"] for one in log.query(Filter())] == ["false_alarm", ""]
