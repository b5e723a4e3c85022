"""pic-evaluate from its arguments to its files."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import click
import numpy as np

from pic_daemon.cascade import load_identifier
from pic_daemon.catalog_index import CatalogIndex
from pic_daemon.errors import InputError
from pic_daemon.folders import text_of
from pic_daemon.model import load_model
from pic_daemon.promise import check_support
from pic_training.evaluation import Evaluation, Plan, drawn, evaluate
from pic_training.evaluation_report import as_html, as_json
from pic_training.near_duplicates import first_copies, look_of
from pic_training.preparation import note_support, say_left_out
from pic_training.run_folder import read_manifest, replacing
from pic_training.sources import Source, Sources, gather, looks_at, scratch_file


def run_evaluation(
    model_file: Path,
    catalog: Path,
    others: Path,
    general: Sequence[str],
    runs: Sequence[Path],
    output: Path,
    cascade: tuple[Path, Path] | None,
    settings: dict[str, Any],
) -> Evaluation:
    """Evaluate and write evaluation.json and evaluation.html into `output`.

    `cascade` is a descriptor and an index to be measured with the model. Raises InputError
    for bad input and where the look-alikes are too few for the target rate.
    """
    model = load_model(model_file)
    identifier = load_identifier(*cascade, "auto") if cascade else None
    plan = Plan(**settings)

    def is_general(source: Source) -> bool:
        return Path(source.path).name.startswith(tuple(general)) if general else False

    with scratch_file() as copies:
        size = model.info.input_size
        sources = gather(catalog, others, None, copies, size)
        say_left_out(sources)
        given = sources.digest_of("other")
        _check_prefixes(general, sources)
        for run in runs:
            sources = _unseen(sources, run, size)
        samples = drawn(sources, is_general, plan)
        if not samples.general:
            click.echo(
                "note: none of the others is --general, or left so, and the published "
                "protocol is asked against look-alikes",
                err=True,
            )
        if sources.digest_of("catalog") != model.info.catalog_digest:
            problem = "for another catalog, or with corrections of it"
            click.echo(f"note: the model was trained {problem}", err=True)
        if identifier:
            _compare(identifier.index, sources)
        if not samples.test:
            raise InputError(
                f"{others} has no two look-alikes that differ: the threshold is chosen on "
                "one and tested on another; add some."
            )
        decoys = len(samples.calibrating)
        check_support(decoys, plan.target_fpr, "add look-alikes or raise --target-fpr")
        different = len(np.unique(sources.groups()[samples.calibration]))
        note_support(different, decoys, plan.target_fpr)
        with _writing(output):  # before all that takes long
            output.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=output).close()
        with click.progressbar(label="samples", length=sum(map(len, samples.parts))) as bar:
            evaluation = evaluate(model, sources, plan, samples, bar.update, identifier)
        asked = {
            "catalog": _named(catalog, sources.digest_of("catalog")),
            "others": _named(others, given),
            "general": list(general),
            "runs": [text_of(str(run.resolve())) for run in runs],
        }
        if identifier:
            descriptor, index = identifier.descriptor, identifier.index
            asked["describe"] = _named(descriptor.path, descriptor.sha256)
            asked["index"] = _named(index.path, index.sha256)
        figures = json.dumps({**as_json(evaluation, model), "asked": asked}, indent=1)
        page = as_html(evaluation, model)
        with _writing(output):
            for name, text in (("json", figures + "\n"), ("html", page)):
                with replacing(output / f"evaluation.{name}") as path:
                    path.write_text(text, encoding="utf-8")
    for name, result in evaluation.methods.items():
        recall = result.trained.recall
        click.echo(
            f"{name}: recall {recall.value:.2%} ({recall.low:.2%} to {recall.high:.2%}) on "
            f"trained edits, {result.held_out.recall.value:.2%} on held-out edits, at a "
            f"false positive rate of {result.overall.false_positive_rate.value:.3%}"
            + (
                f"; right item first {result.named['trained']:.2%} and "
                f"{result.named['held_out']:.2%}"
                if result.named
                else ""
            )
        )
    click.echo(text_of(f"report: {output / 'evaluation.html'}"))
    return evaluation


def _named(path: Path, digest: str) -> dict[str, str]:
    return {"path": text_of(str(path.resolve())), "sha256": digest}


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write into {output}: {error.strerror}.") from error


def _check_prefixes(general: Sequence[str], sources: Sources) -> None:
    names = [Path(p.path).name for p in sources.pictures if p.kind == "other"]
    for prefix in general:
        if not prefix:
            raise InputError("--general needs the beginning of a name, not nothing.")
        if not any(name.startswith(prefix) for name in names):
            raise InputError(f"--general {prefix}: no name among the others begins so.")


def _compare(index: CatalogIndex, sources: Sources) -> None:
    """Say where the index is of other pictures; raise InputError where of quite others."""
    ours = {p.sha256 for p in sources.pictures if p.kind == "catalog"}
    items = {item.sha256 for item in index.items.values()}
    if not ours & items:
        raise InputError(f"index {index.path} holds none of the catalog's pictures.")
    if ours != items:
        click.echo(
            f"note: the index lacks {len(ours - items)} of {len(ours)} catalog pictures, "
            f"whose copies it cannot name, and holds {len(items - ours)} others",
            err=True,
        )


def _unseen(sources: Sources, run: Path, size: int) -> Sources:
    """Without the others that the run has seen, as either kind, or near-duplicates of."""
    seen = read_manifest(run)
    among = list(looks_at(seen, size))
    if missing := len(seen) - len(among):
        click.echo(
            f"note: {missing} of the pictures that {run} has seen are not there any more, "
            "or not the same; of those only the very files are left out, not their "
            "near-duplicates",
            err=True,
        )
    others = [p for p in sources.pictures if p.kind == "other"]
    hashes = set(seen.values())
    looks = [look_of(sources.image(p)) for p in others]
    twins = first_copies(looks, among) if among else repeat(None)
    alike = {p.path for p, twin in zip(others, twins) if twin is not None}  # noqa: B905
    alike |= {p.path for p in others if p.sha256 in hashes}
    groups = {p.group for p in others if p.path in alike}
    alike |= {p.path for p in others if p.group in groups}
    kept = tuple(p for p in sources.pictures if p.kind == "catalog" or p.path not in alike)
    if all(p.kind == "catalog" for p in kept):
        raise InputError(f"{run} has seen every one of the others; give others it has not.")
    left_out = len(sources.pictures) - len(kept)
    click.echo(f"{left_out} of the others left out: {run} has seen them", err=True)
    return replace(sources, pictures=kept)
