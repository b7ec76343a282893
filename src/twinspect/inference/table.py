"""Rows of results to Parquet, CSV or JSON lines, streamed in groups and renamed into place when whole."""

from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from twinspect.errors import ConfigError, TwinspectError

_GROUP = 1024
_TYPES = {
    "path": "string", "class_name": "string", "score": "double", "score_local": "double",
    "score_semantic": "double", "p_joint": "double", "p_value": "double", "threshold": "double",
    "threshold_unsure": "double", "answer": "string", "is_anomaly": "bool", "predicted_class": "string",
    "class_p": "double", "unknown_class": "bool", "prototype_distance": "double", "peak": "double",
    "threshold_region": "double", "n_regions": "int32", "max_region_area": "int64", "regions": "string",
    "width": "int32", "height": "int32", "model_id": "string", "error": "string",
}  # fmt: skip
FORMATS = (".parquet", ".csv", ".jsonl")


class TableWriter:
    """Appends rows and keeps at most one group in memory. A context: an error inside leaves ``NAME.part``.

    Raises:
        ConfigError: a file name that ends in none of the accepted formats.
        TwinspectError: the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix not in FORMATS:
            raise ConfigError(f"--out {path.name}: accepted endings are {', '.join(FORMATS)}")
        self.path, self._rows = path, 0
        self._part = path.with_name(f"{path.name}.part")
        self._group: list[dict[str, Any]] = []
        self._parquet: Any = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            mode, newline, encoding = ("wb", None, None) if path.suffix == ".parquet" else ("w", "", "utf-8")
            self._file: Any = self._part.open(mode, newline=newline, encoding=encoding)
        except OSError as error:
            raise TwinspectError(f"{path} cannot be written ({error.strerror})") from None
        if path.suffix == ".csv":
            csv.DictWriter(self._file, list(_TYPES)).writeheader()

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()
        if kind is None:
            os.replace(self._part, self.path)

    def add(self, row: dict[str, Any]) -> None:
        """Add one row of `Result.row`; not-a-number becomes an empty cell."""
        self._group.append({k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
        if len(self._group) == _GROUP:
            self._flush()

    def close(self) -> None:
        """Write what is left and give the file its name."""
        self.__exit__(None, None, None)

    def _finish(self) -> None:
        self._flush(last=True)
        if self._parquet is not None:
            self._parquet.close()
        self._file.close()

    def _flush(self, last: bool = False) -> None:
        if self.path.suffix == ".parquet":
            self._flush_parquet(last)
        elif self.path.suffix == ".csv":
            csv.DictWriter(self._file, list(_TYPES)).writerows(self._group)
        else:
            self._file.writelines(json.dumps(row) + "\n" for row in self._group)
        self._file.flush()
        self._group = []

    def _flush_parquet(self, last: bool) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        # pyarrow's own aliases: string, double, bool, int32, int64.
        schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in _TYPES.items()])
        if self._parquet is None:
            self._parquet = pq.ParquetWriter(self._file, schema)
        if self._group or last:
            self._parquet.write_table(pa.Table.from_pylist(self._group, schema=schema))
