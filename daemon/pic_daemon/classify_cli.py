"""pic-classify: images asked about once, one by one or a whole archive."""

import json
import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from pic_daemon.bulk import classify_folder
from pic_daemon.cascade import Identifier, load_identifier
from pic_daemon.cli import alone_with, opened
from pic_daemon.errors import InputError
from pic_daemon.folders import about_names, text_of
from pic_daemon.identification import UNDESCRIBED, CloserReading, look_closer
from pic_daemon.images import MAX_PIXELS
from pic_daemon.match_formats import one_line, printing
from pic_daemon.model import Model, Verdict, load_model
from pic_daemon.onnx_session import Provider
from pic_daemon.options import PROVIDERS, FiniteRange, Place
from pic_daemon.reading import Reading, read_image

_BATCH = 32
_PATH = Place()


@click.command()
@click.version_option(package_name="product-image-classifier")
@click.option("--model", required=True, type=_PATH, help="ONNX file made by pic-export.")
@click.option(
    "--describe", type=_PATH, help="Descriptor: names products together with --index."
)
@click.option("--index", type=_PATH, help="Catalog index made by pic-index.")
@click.option(
    "--gate-threshold",
    type=FiniteRange(0, 1),
    help="Score from which on they decide [as the model says].",
)
@click.option("--provider", type=PROVIDERS, default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.option(
    "--recursive",
    type=_PATH,
    metavar="DIR",
    help="All images below DIR, into --database; stopped, it can go on.",
)
@click.option("--database", type=_PATH, help="The match log for --recursive.")
@click.argument("images", nargs=-1, type=_PATH, metavar="IMAGE...")
def classify(model: Path, describe: Path | None, index: Path | None,
             gate_threshold: float | None, provider: Any, as_json: bool,
             recursive: Path | None, database: Path | None,
             images: tuple[Path, ...]) -> None:  # fmt: skip
    """Classify images once and print the result; exit 2 if one could not be read.

    With --recursive the results go into a match log, those that failed among them; exit 1
    if it was stopped, or a part of DIR cannot be looked at.

    Example: pic-classify --model model.onnx --json photo.jpg

    Example: pic-classify --model model.onnx --recursive archive --database archive.db
    """
    if bool(recursive) != bool(database) or bool(recursive) == bool(images):
        raise click.UsageError("Name images, or --recursive DIR with --database FILE.")
    loaded = load_model(model, provider)
    if bool(describe) != bool(index):
        raise InputError("descriptor and index go together: give --describe and --index.")
    identifier = load_identifier(describe, index, provider) if describe and index else None
    if gate_threshold is not None and not identifier:
        raise click.UsageError("--gate-threshold goes with --describe and --index.")
    if recursive and database:
        if as_json:
            raise click.UsageError("--json goes with IMAGE...; here ask pic-matches.")
        _classify_archive(recursive, database, loaded, identifier, gate_threshold, provider)
        return
    gate = None
    if identifier:
        gate = loaded.info.gate_threshold if gate_threshold is None else gate_threshold
    failures = 0
    with printing():
        for start in range(0, len(images), _BATCH):
            part = images[start : start + _BATCH]
            for row in _classify_batch(loaded, identifier, gate, part):
                failures += row["status"] == "failed"
                click.echo(json.dumps(row) if as_json else _line(row))
    if failures:
        raise InputError(f"{failures} of {len(images)} images could not be classified.")


def _line(row: dict[str, Any]) -> str:
    score = "" if row["score"] is None else f"{row['score']:.6f}"
    tail = f"  ({row['error']})" if row["error"] else ""
    if item := row.get("catalog_item"):
        tail += f"  {item!r} ({row['joint_score']:.3f})"
    return f"{row['status']:<8}  {score:>8}  {one_line(row['path'])}{tail}"


def _classify_archive(
    folder: Path, database: Path, model: Model, identifier: Identifier | None,
    gate: float | None, provider: Provider,
) -> None:  # fmt: skip
    if not os.path.isdir(folder):  # before a database is made for it; never raises
        raise InputError(f"{folder} is not a folder.")
    with closing(opened(database)) as log, alone_with(database):
        done = classify_folder(folder, model, log, identifier, gate, provider)
        outdated = log.outdated(folder.resolve())
    told = ", ".join(f"{n} {status}" for status, n in sorted(done.outcomes.items()))
    shown = text_of(str(database))
    nothing = "nothing new" if done.files else f"no image files in {text_of(str(folder))}"
    click.echo(f"{told or nothing}; pic-matches --database {shown}")
    if done.passed_over:
        click.echo(f"note: {about_names(done.passed_over)}", err=True)
    if outdated:
        click.echo(
            f"note: {outdated} were decided by another model or index: pic-daemon "
            f"reclassify --database {shown}, and the same command again",
            err=True,
        )
    if done.refused:
        raise click.ClickException(
            f"{len(done.refused)} folders or files cannot be looked at, first "
            f"{text_of(done.refused[0])}: what lies there was left out."
        )


def _classify_batch(
    model: Model, identifier: Identifier | None, gate: float | None, paths: Sequence[Path]
) -> list[dict[str, Any]]:
    size = model.info.input_size
    readings = [read_image(os.path.realpath(path), size) for path in paths]
    verdicts = iter(model.judge([r.image for r in readings if r.image], gate))
    rows = []
    for path, reading in zip(paths, readings, strict=True):
        verdict = next(verdicts) if reading.image else None
        gone = "changed while being read"
        if reading.stamp is None:
            gone = "no regular file" if os.path.exists(path) else "no such file"
        row = {
            "path": text_of(str(path)),
            "status": verdict.status if verdict else "failed",
            "score": verdict.score if verdict else None,
            "threshold": model.info.threshold,
            "error": verdict.reason if verdict else reading.error or gone,
        }
        if identifier and gate is not None and verdict:
            row |= _second_stage(identifier, gate, reading, verdict)
        rows.append(row)
    return rows


def _second_stage(
    identifier: Identifier, gate: float, reading: Reading, verdict: Verdict
) -> dict[str, Any]:
    """What descriptor and index change of a row."""
    row: dict[str, Any] = {"status": "no-match", "threshold": gate}
    if verdict.reason or verdict.score < gate:
        return row
    size = identifier.descriptor.info.input_size
    (seen,) = look_closer(reading.path, reading.sha256, size, MAX_PIXELS)
    if not isinstance(seen, CloserReading):
        problem = seen.error or "changed while being read"
        return {"status": "failed", "score": None, "error": problem}
    found = identifier.identify(seen.closeup)
    return row | (found.columns() if found else UNDESCRIBED)
