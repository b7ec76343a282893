"""``twinspect predict``: options to a `Job`, and its progress to the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from twinspect.inference.bulk import Engine


def predict(
    bundle: Annotated[Path, typer.Argument(help="Trained model (.twin) or exported model.")],
    paths: Annotated[
        list[str],
        typer.Argument(
            help="Images, folders, quoted globs, @lists, tar and zip files, tables, URLs, videos, camera:0, "
            "rtsp://..., or @- for paths from standard input."
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            help="Table to write: .parquet, .csv, .jsonl, or a folder (DIR/, or a URL) of Parquet parts; - prints "
            "rows as JSON lines, -.csv as CSV."
        ),
    ] = "",
    class_name: Annotated[str, typer.Option("--class", help="Class of all images; empty predicts it.")] = "",
    maps: Annotated[str, typer.Option(help="Folder for raw maps (float16).")] = "",
    map_format: Annotated[str, typer.Option(help="npz or tiff.")] = "npz",
    masks: Annotated[str, typer.Option(help="Folder for masks (PNG, 255 above the region threshold).")] = "",
    overlays: Annotated[str, typer.Option(help="Folder for pictures of images under their maps.")] = "",
    coco: Annotated[str, typer.Option(help="COCO file of all regions.")] = "",
    submission: Annotated[
        str, typer.Option(help="Folder for MVTec AD 2's submission: maps and thresholded maps.")
    ] = "",
    batch: Annotated[
        int, typer.Option(help="Images per call of the model; 0: one for each CPU thread, 16 on a GPU.")
    ] = 0,
    workers: Annotated[int, typer.Option(help="Processes that decode; -1: automatic, 0: threads.")] = -1,
    weights: Annotated[Optional[Path], typer.Option(help="Local weights file of the teacher.")] = None,  # noqa: UP045
    runtime: Annotated[
        str, typer.Option(help="auto, torch, onnx or openvino; auto is what the file was made for.")
    ] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads of the runtime; 0 is its own choice.")] = 0,
    device: Annotated[str, typer.Option(help="Of a bundle: auto, cpu, cuda or cuda:1.")] = "auto",
    part_rows: Annotated[int, typer.Option(help="Rows written at a time; 0: 256, or 4096 in a folder.")] = 0,
    watch: Annotated[bool, typer.Option("--watch", help="Go on with images that arrive in the folders.")] = False,
    fail_on: Annotated[
        str,
        typer.Option(help="Exit code 3: anomaly: an image is one, or cannot be read; error: one cannot be read."),
    ] = "",
    restart: Annotated[bool, typer.Option("--restart", help="Drop what an unfinished run left.")] = False,
    shard: Annotated[str, typer.Option(help="I/N: only this machine's share, into one folder.")] = "0/1",
    engine: Annotated[str, typer.Option(help="local or ray.")] = "local",
    actors: Annotated[int, typer.Option(help="Ray: models; 0: as many as fit.")] = 0,
    actor_cpus: Annotated[float, typer.Option(help="Ray: CPUs of an actor.")] = 1.0,
    actor_gpus: Annotated[float, typer.Option(help="Ray: GPUs of an actor.")] = 0.0,
    ray_address: Annotated[str, typer.Option(help="Ray: running cluster.")] = "",
) -> None:
    """Score images; one that cannot be read becomes a row with an error, and a run that was killed goes on.

    Of a source without an end (camera, network stream, --watch) each image is answered before the next is asked for,
    and --fail-on ends the run. Exit code 1: none of the images could be read.
    """
    from twinspect.console import FAILED_ON, NOTHING_SCORED, Console

    with Console() as console:
        from twinspect.inference.bulk import run, say_totals
        from twinspect.inference.job import Job
        from twinspect.inference.pictures import PictureOptions

        pictures = PictureOptions(maps, map_format, masks, overlays, submission, bool(coco))
        job = Job(
            str(bundle), tuple(paths), out, pictures, coco, runtime, threads, batch, str(weights or ""), device,
            class_name or None, workers, part_rows, shard_of(shard), restart, watch, fail_on,
        )  # fmt: skip
        chosen = chosen_engine(engine, job.keeps_parts, actors, actor_cpus, actor_gpus, ray_address)
        totals = run(job, console, chosen)
        (console.warn if job.on_stdout else console.say)(say_totals(totals, out))
        if totals.nothing_scored:
            raise typer.Exit(NOTHING_SCORED)
        if totals.fails(fail_on):
            raise typer.Exit(FAILED_ON)


def shard_of(text: str) -> tuple[int, int]:
    """``I/N`` as two numbers.

    Raises:
        ConfigError: anything else.
    """
    from twinspect.errors import ConfigError

    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal()):
        raise ConfigError(f"--shard {text}: accepted I/N, such as 0/4 on the first of four machines")
    return int(number), int(of)


def chosen_engine(name: str, keeps_parts: bool, actors: int, cpus: float, gpus: float, address: str) -> Engine | None:
    """The engine of that name; None is this process.

    Raises:
        ConfigError: an unknown name, Ray without a table, or Ray's options without Ray.
    """
    from twinspect.errors import ConfigError, unknown_name

    if name not in ("local", "ray"):
        raise ConfigError(unknown_name("engine", name, ("local", "ray")))
    if name == "local":
        if actors or gpus or address or cpus != 1.0:
            raise ConfigError("--actors, --actor-cpus, --actor-gpus and --ray-address need --engine ray")
        return None
    if not keeps_parts:
        raise ConfigError("--engine ray writes a table; give --out FILE")
    from twinspect.inference.on_ray import RayEngine

    return RayEngine(actors, cpus, gpus, address)
