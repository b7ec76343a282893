"""What to predict, where rows go and what is written beside them (`Job`). Light to import, as ``--help`` needs it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from twinspect.config import Range, argument, check_options, option
from twinspect.device import PRECISIONS
from twinspect.errors import ConfigError
from twinspect.files import is_url

MOST_BATCH, THREADS = 4096, Range(0, 1024)
_FILE_ROWS, _FOLDER_ROWS = 256, 4096  # of a part: what a killed run repeats at most
CAMERA = "camera:"
_STDIN = "@-"  # a list that others write while it is read
_ENDLESS = (CAMERA, "rtsp://", "rtsps://", "rtmp://", "udp://", "tcp://")


def is_endless(source: object) -> bool:
    """Whether a source is a camera (``camera:0``) or a stream of video from the network."""
    return isinstance(source, str) and source.lower().startswith(_ENDLESS)


def is_live(source: object) -> bool:
    """Whether images of a source may still be in the making, so that none is to be read ahead."""
    return source == _STDIN or is_endless(source)


@dataclass(frozen=True, slots=True)
class Job:
    """Score images, and write a table of the answers.

    An image that cannot be read becomes a row with an error. After a kill, the same command goes on.

    Of a source without an end (camera, network stream, --watch) each image is answered before the next is asked for,
    and --fail-on ends the run. Exit code 1: none of the images could be read.
    """

    model: Path = argument("Trained model (.twin) or exported model.")
    sources: tuple[str, ...] = argument(
        "Images, folders, quoted globs, @lists, tar and zip files, tables, URLs, videos, camera:0, rtsp://..., or @- "
        "for paths from standard input."
    )
    out: str = option(
        "Table to write: .parquet, .csv, .jsonl, or a folder (DIR/, or a URL) of Parquet parts; - prints rows as "
        "JSON lines.",
        "",
    )
    class_name: str = option(
        "Class (product) of all images; without: the one that each image looks like most.", "", "--class"
    )
    maps: str = option("Folder for raw maps (.npz, float16).", "")
    masks: str = option("Folder for masks of the regions (PNG, 255 inside).", "")
    overlays: str = option("Folder for pictures: image under its map, regions, answer.", "")
    overlay_format: str = option("Format of these pictures: jpg or png.", "jpg", accepts=("jpg", "png"))
    overlay_side: int = option(
        "Longest side of these pictures in pixels; 0: that of the image.", 1600, accepts=Range(0, 65_000)
    )
    coco: str = option("COCO file of all regions.", "")
    report: tuple[Path, ...] = option("Report file: .html (with charts and the images to look at), .md or .json.", ())
    submission: str = option("Folder for MVTec AD 2's submission: maps and thresholded maps.", "")
    batch: int = option(
        "Images per call of the model; 0: one for each CPU thread, 16 on a GPU.", 0, accepts=Range(0, MOST_BATCH)
    )
    workers: int = option("Processes that decode; -1: automatic, 0: threads.", -1, accepts=Range(-1, 512))
    threads: int = option("CPU threads of the runtime; 0 is its own choice.", 0, accepts=THREADS)
    device: str = option("Where a bundle (.twin) runs: auto, cpu, cuda or cuda:1.", "auto")
    precision: str = option(
        "Of a bundle on a GPU: fp32, or tf32: up to three times as fast, scores differ a little.", "fp32",
        accepts=PRECISIONS,
    )  # fmt: skip
    part_rows: int = option("Rows written at a time; 0: 256, or 4096 in a folder.", 0, accepts=Range(0, 1 << 20))
    watch: bool = option(
        "Go on with images that arrive in the folders, until it is stopped; rows go to --out -.", False, "--watch"
    )
    fail_on: str = option(
        "anomaly: exit code 3 if an image is anomalous or unreadable; error: if unreadable.", "",
        accepts=("anomaly", "error"),
    )  # fmt: skip
    restart: bool = option("Begin anew: drop what an unfinished run left.", False, "--restart")
    shard: str = option("I/N, from 0/N on: score one of N shares only; all of them go into one folder.", "0/1")
    engine: str = option("local, or ray for a Ray cluster.", "local", accepts=("local", "ray"))
    actors: int = option("Ray: processes, each with a model; 0: as many as fit.", 0, accepts=Range(0, 100_000))
    actor_cpus: float = option("Ray: CPUs of a process.", 1.0, accepts=Range(0.01, 1024))
    actor_gpus: float = option("Ray: GPUs of a process.", 0.0, accepts=Range(0, 64))
    ray_address: str = option("Ray: address of a running cluster, or auto.", "")

    def check(self) -> None:
        """Refuse, by a ConfigError, values that are not accepted and options that do not go together."""
        check_options(self)
        _, of = self.share
        if of > 1 and (not self.is_folder or self.coco):
            raise ConfigError("--shard writes parts to one folder (--out DIR/), and no --coco")
        if self.coco and not self.keeps_parts:
            raise ConfigError("--coco is made from the run's parts; give --out FILE as well")
        if self.is_live and self.keeps_parts:
            raise ConfigError(
                f"{self.sources[0]}: a source without an end writes no table; its rows go to standard output as they "
                "are made: --out - (JSON lines, for a pipe or > FILE)"
            )
        if len(self.sources) > 1 and any(map(is_live, self.sources)):
            raise ConfigError("a camera, a stream or @- is given alone; start one predict for each")
        if self.engine == "ray" and not self.keeps_parts:
            raise ConfigError("--engine ray writes a table; give --out FILE")
        of_ray = (self.actors, self.actor_cpus, self.actor_gpus, self.ray_address)
        if self.engine == "local" and of_ray != (0, 1.0, 0.0, ""):
            raise ConfigError("--actors, --actor-cpus, --actor-gpus and --ray-address need --engine ray")

    @property
    def share(self) -> tuple[int, int]:
        """Number of this machine, and of how many: it scores only every so many-th unit of the input."""
        number, _, of = self.shard.partition("/")
        if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
            raise ConfigError(f"--shard {self.shard}: accepted 0/N to N-1/N, such as 0/4 on the first of 4 machines")
        return int(number), int(of)

    @property
    def prints_rows(self) -> bool:
        """Whether rows go to standard output."""
        return self.out == "-"

    @property
    def is_live(self) -> bool:
        """Whether each image is answered before the next one is asked for."""
        return self.watch or is_live(self.sources[0])

    @property
    def keeps_parts(self) -> bool:
        """Whether rows go to files, in parts from which a killed run goes on."""
        return self.out not in ("", "-")

    @property
    def is_folder(self) -> bool:
        """Whether the parts themselves are the table."""
        return self.out.endswith(("/", os.sep)) or is_url(self.out) or (self.keeps_parts and Path(self.out).is_dir())

    @property
    def rows_of_a_part(self) -> int:
        """Rows of a part."""
        return self.part_rows or (_FOLDER_ROWS if self.is_folder else _FILE_ROWS)

    @property
    def wants_maps(self) -> bool:
        """Whether something is written that is made of the anomaly map."""
        return any((self.maps, self.masks, self.overlays, self.submission, self.coco))
