"""What an inspection log must do on every database; the SQLite and PostgreSQL tests both run these."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import pytest

from twinspect.errors import ConfigError
from twinspect.inference.regions import Region
from twinspect.inference.result import Result
from twinspect.server import Refused
from twinspect.server.log import Filter, Inspection, InspectionLog

NASTY = "x'; DROP TABLE twinspect_inspections; --"


def result(name: str = "a.png", answer: str = "good", score: float = 1.5, **changes: object) -> Result:
    values: dict = {
        "score_local": score, "p_value": 0.5, "threshold": 2.0, "answer": answer, "is_anomaly": answer == "anomaly",
        "class_name": "part", "predicted_class": "part", "model_id": "m1", "width": 30, "height": 20, "peak": 3.0,
        "regions": [Region(1, 2, 3, 4, 5, 6.5, 0.25)] if answer == "anomaly" else [],
    }  # fmt: skip
    return Result(name, score, **{**values, **changes})


def row(at_ms: int = 1000, bundle: str = "parts", session: str = "", key: str = "k", **changes: object) -> Inspection:
    return Inspection(result(**changes), key, bundle, "request", session, at_ms)


def keeps_rows_and_gives_them_back(log: InspectionLog) -> None:
    numbers = log.append([row(at_ms=n, name=f"{n}.png", score=n / 2) for n in range(1, 6)])
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 5
    found = log.query(Filter())
    assert [one["id"] for one in found] == numbers[::-1]
    assert [one["score"] for one in found] == [2.5, 2.0, 1.5, 1.0, 0.5]
    last = found[0]
    assert (last["name"], last["at_ms"], last["bundle"], last["feedback"]) == ("5.png", 5, "parts", "")
    assert last["score_semantic"] is None  # NaN is nothing
    assert [one["severity"] for one in found] == [1.25, 1.0, 0.75, 0.5, 0.25]
    log.append([row(threshold=math.nan)])
    assert log.query(Filter(limit=1))[0]["severity"] is None
    assert math.isclose(last["p_value"], 0.5)
    assert last["regions"] == []


def keeps_regions_unicode_and_odd_names(log: InspectionLog) -> None:
    name = "Teil ü 部品\x00\ud800\n" + "x" * 300
    log.append([row(answer="anomaly", name=name)])
    (found,) = log.query(Filter())
    assert found["regions"] == [{"x": 1, "y": 2, "width": 3, "height": 4, "area": 5, "score": 6.5, "p_value": 0.25}]
    assert found["name"].startswith("Teil ü 部品 ?")
    assert len(found["name"]) == 200


def filters_by_time_class_answer_and_the_rest(log: InspectionLog) -> None:
    log.append(
        [
            row(at_ms=10, class_name="bolt", answer="anomaly", name="A_1.png"),
            row(at_ms=20, class_name="nut", session="night"),
            row(at_ms=30, class_name="nut", answer="unsure", bundle="other"),
            row(at_ms=40, class_name="nut", name="100%_b.png"),
        ]
    )

    def times(**wanted: object) -> list[int]:
        return [one["at_ms"] for one in log.query(Filter(**wanted))]  # type: ignore[arg-type]

    assert times(since_ms=20) == [40, 30, 20]
    assert times(since_ms=20, until_ms=40) == [30, 20]
    assert times(class_name="bolt") == [10]
    assert times(class_name="nut", answer="good") == [40, 20]
    assert times(bundle="other") == [30]
    assert times(session="night") == [20]
    assert times(name="a_1") == [10]
    assert times(name="%_") == [40]  # not a pattern
    assert times(limit=2) == [40, 30]
    assert times(limit=2, before=log.query(Filter(limit=2))[-1]["id"]) == [20, 10]
    assert times(class_name=NASTY) == times(name=NASTY) == times(session=NASTY) == []
    assert len(times()) == 4


def keeps_feedback(log: InspectionLog) -> None:
    alarm, fine = log.append([row(answer="anomaly"), row(answer="good")])
    changed = log.give_feedback(alarm, "false_alarm", "dust " + NASTY)
    assert (changed["feedback"], changed["note"]) == ("false_alarm", "dust " + NASTY)
    assert changed == log.query(Filter(feedback="false_alarm"))[0]
    assert [one["id"] for one in log.query(Filter(feedback="none"))] == [fine]
    log.give_feedback(fine, "missed")
    log.give_feedback(alarm, "")
    assert [one["feedback"] for one in log.query(Filter())] == ["missed", ""]
    with pytest.raises(ConfigError, match="contradicts"):
        log.give_feedback(fine, "false_alarm")
    with pytest.raises(ConfigError, match="contradicts"):
        log.give_feedback(alarm, "missed")
    with pytest.raises(Refused, match="999999"):
        log.give_feedback(999999, "confirmed")


def scans_one_model_in_order(log: InspectionLog) -> None:
    for start in range(0, 2500, 500):
        log.append([row(at_ms=n, model_id="m1" if n % 2 else "m2") for n in range(start, start + 500)])
    found = [one["at_ms"] for one in log.scan("m1")]
    assert found == list(range(1, 2500, 2))
    assert [one["at_ms"] for one in log.scan("m1", 2400)] == list(range(2401, 2500, 2))


def deletes_what_is_old(log: InspectionLog) -> None:
    log.append([row(at_ms=1000), Inspection(result(), "k", "parts", "r")])  # of 1970, and of now
    assert log.prune(30) == 1
    assert len(log.query(Filter())) == 1


def takes_rows_from_several_threads(log: InspectionLog) -> None:
    trouble: list[Exception] = []

    def write(number: int) -> None:
        try:
            for n in range(20):
                log.append([row(at_ms=n, name=f"{number}-{n}")])
                log.query(Filter(limit=5))
        except Exception as error:
            trouble.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    assert trouble == []
    assert len(log.query(Filter(limit=200))) == 80


CASES: tuple[Callable[[InspectionLog], None], ...] = (
    keeps_rows_and_gives_them_back,
    keeps_regions_unicode_and_odd_names,
    filters_by_time_class_answer_and_the_rest,
    keeps_feedback,
    scans_one_model_in_order,
    deletes_what_is_old,
    takes_rows_from_several_threads,
)
