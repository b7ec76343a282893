"""What to predict and where rows go (`Job`). No torch."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from twinspect.data.images import is_image
from twinspect.errors import BundleError, ConfigError, check_range, unknown_name
from twinspect.files import refuse_unwritable
from twinspect.inference.parts import PartStore
from twinspect.inference.pictures import PictureOptions, is_own_coco
from twinspect.inference.predictor import check_counts
from twinspect.inference.result import columns
from twinspect.inference.sources import is_live, would_find
from twinspect.inference.stores import is_url
from twinspect.inference.table import FORMATS, is_own
from twinspect.inference.video import is_endless

FILE_ROWS, FOLDER_ROWS, MOST_ROWS = 256, 4096, 1 << 20  # of a part: what a killed run repeats at most
MOST_WORKERS = 512
_ON_STDOUT = {"-": ".jsonl", "-.jsonl": ".jsonl", "-.csv": ".csv"}  # --out, and what it prints


@dataclass(frozen=True, slots=True)
class Job:
    """What to run, and where rows go. Plain values only, as it travels to other machines.

    Attributes:
        model: bundle or exported model.
        sources: paths, folders, globs, ``@lists``, archives, tables, URLs.
        out: table (.parquet, .csv, .jsonl), folder of Parquet parts (``DIR/`` or a URL); ``-`` or ``-.csv`` prints
            the rows as JSON lines or CSV; empty prints lines for people.
        pictures: what to write beside it.
        threads, batch, weights, device: as `inference.load`.
        class_name: class of all images; None predicts it.
        workers: processes that decode; 0 decodes in threads of this one; -1 is automatic.
        rows: rows of a part; 0 takes 256 for a file and 4,096 for a folder.
        shard: (number, of how many): only every so many-th unit, for several machines on one folder.
        restart: drop what an unfinished run left.
        watch: go on with images that arrive in the sources, which are folders.
        fail_on: ``anomaly`` or ``error``: what ends an endless run; see `bulk.Totals.fails`.
    """

    model: str
    sources: tuple[str, ...]
    out: str = ""
    pictures: PictureOptions = field(default_factory=PictureOptions)
    threads: int = 0
    batch: int = 0
    weights: str = ""
    device: str = "cpu"
    class_name: str | None = None
    workers: int = -1
    rows: int = 0
    shard: tuple[int, int] = (0, 1)
    restart: bool = False
    watch: bool = False
    fail_on: str = ""

    def __post_init__(self) -> None:
        check_range("--part-rows", self.rows, 0, MOST_ROWS)
        check_range("--workers", self.workers, -1, MOST_WORKERS)
        check_counts(self.threads, self.batch)
        if self.fail_on not in ("", "anomaly", "error"):
            raise ConfigError(unknown_name("--fail-on", self.fail_on, ("anomaly", "error")))
        (number, of), coco = self.shard, self.pictures.coco
        if not 0 <= number < of:
            raise ConfigError(f"--shard {number}/{of}: accepted 0/N to N-1/N, such as 0/4")
        if of > 1 and (not self.is_folder or coco):
            raise ConfigError("--shard writes parts to one folder (--out DIR/), and no --coco")
        if coco and not self.keeps_parts:
            raise ConfigError("--coco is made from the run's parts; give --out FILE as well")
        if self.is_live and self.keeps_parts:
            raise ConfigError(
                f"{self.sources[0]}: a source without an end writes no table; its rows go to standard output as they "
                "are made: --out - (JSON lines, for a pipe or > FILE), or -.csv"
            )
        if len(self.sources) > 1 and any(map(is_live, self.sources)):
            raise ConfigError("a camera, a stream or @- is given alone; start one predict for each")
        if self.keeps_parts and not self.is_folder:
            self._check_format(Path(self.out))

    @staticmethod
    def _check_format(out: Path) -> None:
        if out.suffix not in FORMATS:
            accepted = f"accepted endings are {', '.join(FORMATS)}; a folder (DIR/) takes Parquet parts"
            raise ConfigError(f"--out {out.name}: {accepted}")
        if out.suffix == ".parquet" and find_spec("pyarrow") is None:
            raise ConfigError(f"--out {out.name}: Parquet needs pyarrow; type: pip install pyarrow, or take .csv")

    @property
    def on_stdout(self) -> str:
        """Format of the rows that standard output gets; empty where it gets none."""
        return _ON_STDOUT.get(self.out, "")

    @property
    def is_endless(self) -> bool:
        """Whether the sources have no end of their own."""
        return self.watch or is_endless(self.sources[0])

    @property
    def is_live(self) -> bool:
        """Whether each image is answered before the next one is asked for."""
        return self.is_endless or is_live(self.sources[0])

    @property
    def keeps_parts(self) -> bool:
        """Whether rows go to files, in parts from which a killed run goes on."""
        return bool(self.out) and not self.on_stdout

    @property
    def is_folder(self) -> bool:
        """Whether the parts themselves are the table."""
        return self.out.endswith(("/", os.sep)) or is_url(self.out) or Path(self.out).is_dir()

    @property
    def part_rows(self) -> int:
        """Rows of a part."""
        return self.rows or (FOLDER_ROWS if self.keeps_parts and self.is_folder else FILE_ROWS)

    @property
    def decoders(self) -> int:
        """Decoding processes; 0 is threads."""
        if self.workers >= 0:
            return self.workers
        return max(1, min(8, (os.cpu_count() or 1) - 1)) if self.keeps_parts else 0

    def check_outputs(self) -> None:
        """Find out before the work whether all can be written, and that no picture comes to lie among the images.

        A ConfigError where not, also where another program's file would be replaced.
        """
        if self.keeps_parts and not self.is_folder:
            refuse_unwritable(Path(self.out), "--out", ours=is_own)
        if self.pictures.coco:
            refuse_unwritable(Path(self.pictures.coco), "--coco", ours=is_own_coco)
        for option, place in self.pictures.places():
            if not is_url(place):
                refuse_unwritable(Path(place), option)
            if is_image(place) and self._would_find(place):
                raise ConfigError(
                    f"{option} {os.path.dirname(place)}: images are read from there, and the next run would take "
                    f"these pictures for images; choose a folder outside of {', '.join(self.sources[:3])}"
                )

    def _would_find(self, place: str) -> bool:
        """Whether the same command would read a picture that it has written; a shell expands globs to their files."""
        like = (path for path in self.sources if is_image(path) and path.lower().endswith(Path(place).suffix))
        beside = sum(Path(path).resolve().parent == Path(place).resolve().parent for path in like)
        return beside > 1 or any(would_find(source, place) for source in self.sources)

    def store(self) -> PartStore:
        """Where parts are kept: the folder itself, or one beside the file until it is whole."""
        if self.is_folder:
            return PartStore(self.out, ".parquet")
        return PartStore(f"{self.out}.parts", Path(self.out).suffix)

    def settings(self) -> dict[str, Any]:
        """What parts of one run must have in common."""
        return {
            "model": _decision_digest(Path(self.model)),
            "class": self.class_name or "",
            "part-rows": self.part_rows,
            "columns": " ".join(column.name for column in columns()),  # another version may have others
            **{name.replace("_", "-"): value for name, value in asdict(self.pictures).items()},
        }


def _decision_digest(path: Path) -> str:
    """What identifies a model with its calibration, without building it."""
    from twinspect.inference.runtimes import is_export, read_export

    if is_export(path):
        decision = read_export(path).decision
    else:
        try:
            from twinspect.bundle import read_bundle
        except ImportError:  # the light install has no bundles
            raise BundleError(f"{path.name} is a bundle; this install runs exported models (.onnx) only") from None
        decision = read_bundle(path).meta["decision"]
    return hashlib.sha256(json.dumps(decision, sort_keys=True).encode()).hexdigest()[:16]
