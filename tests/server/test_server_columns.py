"""A column of a result is one field of `Result`: tables, server, OpenAPI, log and docs follow.

After a new column type: python tests/server/test_server_columns.py, and put what it prints into
docs/reference/columns.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from log_cases import row

from twinspect.inference.result import Column, columns
from twinspect.server.log import InspectionLog

ROOT = Path(__file__).parents[2]

# One more field, in every module that has looked at `Result` so far.
WIDER = """
import json, sys
from dataclasses import dataclass
from pathlib import Path
import twinspect.inference.result as home

@dataclass(slots=True)
class Wider(home.Result):
    brightness: float = home.column("double", "Mean grey value")

    def __post_init__(self):
        self.brightness = self.width / 2

old = home.Result
for module in list(sys.modules.values()):
    if getattr(module, "Result", None) is old:
        module.Result = Wider
home.columns.cache_clear()
folder = Path(sys.argv[1])
"""
EVERYWHERE = """
import pyarrow.parquet
from twinspect.inference.outputs import encode, join
from twinspect.server.log import InspectionLog
from serving import Running, encoded, predictor

seen = {}
image = folder / "a.png"
image.write_bytes(encoded())  # 48 pixels wide
rows = [result.row() for result in predictor().predict([image])]
for suffix in (".csv", ".jsonl", ".parquet"):
    join([encode(rows, suffix)], folder / f"rows{suffix}")
seen["csv"] = (folder / "rows.csv").read_text().splitlines()[0].split(",").count("brightness")
seen["jsonl"] = json.loads((folder / "rows.jsonl").read_text())["brightness"]
seen["parquet"] = pyarrow.parquet.read_table(folder / "rows.parquet")["brightness"].to_pylist()
log = InspectionLog(str(folder / "log.db"))
with Running(log=log) as server:
    seen["answer"] = server.post(encoded()).json["results"][0]["brightness"]
    schemas = server.get("/openapi.json").json["components"]["schemas"]
    for name in ("ImageAnswer", "LogRow"):
        seen[name] = schemas[name]["properties"]["brightness"]["description"]
    seen["log"] = [row["brightness"] for row in server.get("/v1/log").json["rows"]]
log.close()
print(json.dumps(seen))
"""


def run(code: str, folder: Path) -> str:
    place = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {place!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_field_is_a_column_everywhere_and_older_logs_get_it(tmp_path: Path) -> None:
    log = InspectionLog(str(tmp_path / "log.db"))
    log.append([row()])
    log.close()
    seen = json.loads(run(WIDER + EVERYWHERE, tmp_path))
    assert seen == {
        "csv": 1, "jsonl": 24.0, "parquet": [24.0], "answer": 24.0, "ImageAnswer": "Mean grey value",
        "LogRow": "Mean grey value", "log": [24.0, 15.0],
    }  # fmt: skip


def test_docs_list_every_column() -> None:
    text = (ROOT / "docs" / "reference" / "columns.md").read_text(encoding="utf-8")
    assert "\n".join(docs_table(columns())) in text, __doc__


def docs_table(listed: tuple[Column, ...]) -> list[str]:
    """The columns as a Markdown table."""
    words = {"string": "text", "double": "number", "bool": "true or false", "regions": "JSON text"}
    rows = (f"| `{one.name}` | {words.get(one.kind, 'whole number')} | {one.help} |" for one in listed)
    return ["| column | holds | meaning |", "|---|---|---|", *rows]


if __name__ == "__main__":
    print("\n".join(docs_table(columns())))
