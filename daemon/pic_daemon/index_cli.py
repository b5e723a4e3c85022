"""The command pic-index: make, update, list and edit a catalog index."""

import glob
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from pic_daemon.catalog_index import About, CatalogIndex, Promise, files_in, load_index
from pic_daemon.decoys import Measured, decoys_in, measure
from pic_daemon.descriptor import Descriptor, load_descriptor
from pic_daemon.errors import InputError
from pic_daemon.folders import about_names, text_of
from pic_daemon.identification import DEFAULT_THRESHOLD
from pic_daemon.indexing import Update, check_shut, find_twins, remove, update, workers
from pic_daemon.lock import lock
from pic_daemon.options import PROVIDERS, FiniteRange, Place
from pic_daemon.promise import about_support

_PATH = Place()
_SAVE_S = 600.0
_NAMED = 20  # files named of each kind; the others are counted (--list has the refused)
_NEARLY_COPIES = 0.9  # joint score; look-alikes asked for 0.75 (bench/results/cascade.md)


@click.command()
@click.version_option(package_name="product-image-classifier")
@click.option("--output", required=True, type=_PATH, help="The index file.")
@click.option("--catalog", type=_PATH, help="Folder of the catalog's pictures.")
@click.option("--model", type=_PATH, help="Descriptor: ONNX file made by pic-export.")
@click.option(
    "--others",
    type=_PATH,
    help="Folder of pictures that are no copies, and that the descriptor was not trained "
    "on, to choose the threshold on.",
)
@click.option(
    "--target-fpr",
    type=FiniteRange(1e-9, 1),  # no folder holds more than a lower one takes
    default=0.001,
    show_default=True,
    help="Largest share of them that may match.",
)
@click.option("--provider", type=PROVIDERS, default="auto", show_default=True)
@click.option(
    "--list",
    "listed",
    is_flag=True,
    help="Print the items of the index, and what it refused.",
)
@click.option(
    "--remove",
    "names",
    multiple=True,
    metavar="ITEM",
    help="Drop an item, named as --list does; may be repeated.",
)
def index(output: Path, catalog: Path | None, model: Path | None, others: Path | None,
          target_fpr: float, provider: Any, listed: bool,
          names: tuple[str, ...]) -> None:  # fmt: skip
    """Make the catalog index that pic-daemon names products by, or bring it up to date.

    Run again, it describes new and changed pictures and drops those that are gone; a
    running pic-daemon picks the file up. One that is stopped has kept what it had ten
    minutes before, beside the index, and the next run goes on from there. The threshold
    stays as it was measured until --others measures it anew; another descriptor asks for
    that.

    Example: pic-index --catalog products --model describe.onnx --others strangers
    --output catalog.index
    """
    if listed or names:
        if catalog or model or others or (listed and names):
            raise click.UsageError("--list and --remove go with --output alone.")
        if listed:
            found = load_index(output)
            for item in sorted(found.items.values(), key=lambda i: i.name):
                click.echo(f"{item.sha256[:12]}  {_shown(item.name)}")
            for refused in found.refused:
                click.echo(f"refused {_shown(refused.name)}: {text_of(refused.reason)}")
            return
        with _alone(output):
            found = load_index(output)
            by_shown = {_shown(item.name): item.name for item in found.items.values()}
            remove(found, [by_shown.get(name, name) for name in names])
            found.save()
        click.echo(
            f"{text_of(str(output))}: {len(names)} removed, {len(found.items)} items left. "
            f"The next run adds what is still in {text_of(found.about.catalog)} again."
        )
        return
    if not catalog or not model:
        raise click.UsageError("give --catalog and --model, or --list or --remove.")
    given = click.get_current_context().get_parameter_source("target_fpr")
    if not others and given is ParameterSource.COMMANDLINE:
        raise click.UsageError("--target-fpr is of the pictures that --others names.")
    _build(output, catalog, load_descriptor(model, provider), others, target_fpr)


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Keep other runs off the index, which would lose what this one does; SIGTERM to this
    process ends it as Ctrl-C does, and what a killed one left half written is removed."""
    name = str(output.with_name(f".{output.name}.lock"))
    try:
        held = lock(name)
    except BlockingIOError as error:
        raise InputError(
            f"another pic-index is at work on {output}: wait for it, or stop it."
        ) from error
    except OSError as error:
        raise InputError(f"cannot lock {name}: {error.strerror}.") from error
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for saved in (output.name, _partial_of(output).name):
            for left in output.parent.glob(f".{glob.escape(saved)}.*.tmp"):
                if left.name[len(saved) + 2 : -len(".tmp")].isdigit():
                    left.unlink(missing_ok=True)
        yield
    finally:
        os.close(held)


def _partial_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


def _build(output: Path, catalog: Path, descriptor: Descriptor, others: Path | None,
           target_fpr: float) -> None:  # fmt: skip
    for folder in (catalog, *([others] if others else [])):
        if not os.path.isdir(folder):
            raise InputError(f"{folder} does not exist or is no folder.")
    # All that hours of describing would find out too late.
    home = output.absolute().parent
    if not os.path.isdir(home):
        raise InputError(f"cannot write {output}: its folder does not exist.")
    if not os.access(home, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {output}: its folder is not writable.")
    if others:
        decoys_in(others, target_fpr)
    with _alone(output):
        _bring_up_to_date(output, catalog, descriptor, others, target_fpr)


def _bring_up_to_date(output: Path, catalog: Path, descriptor: Descriptor,
                      others: Path | None, target_fpr: float) -> None:  # fmt: skip
    made = open_or_empty(output, catalog, descriptor, bool(others))
    partial = _partial_of(output)
    made, resumed = _resumed(partial, made)
    with workers() as pool:
        with _progress("items") as show:
            done = update(made, descriptor, pool, _saving(made, partial, show))
        if done.added and others:  # which may take as long again
            _keep(made, partial)
        measured = None
        if others:
            with _progress("decoys") as show:
                measured = measure(made, descriptor, others, target_fpr, pool, show)
            made.about = replace(made.about, promise=measured.promise)
        made.save()
        fresh = made.first_vectors() if resumed else done.fresh
        done.twins = list(find_twins(made, fresh, pool))
    partial.unlink(missing_ok=True)
    _report(made, done, measured)


def _resumed(partial: Path, made: CatalogIndex) -> tuple[CatalogIndex, bool]:
    """What a run that was stopped had come to, if it was of the same descriptor and folder;
    and whether that is so."""
    if not os.path.exists(partial):
        return made, False
    try:
        left = load_index(partial)
    except InputError:  # it is only made anew
        return made, False
    same = (left.about.descriptor, left.about.catalog)
    if same != (made.about.descriptor, made.about.catalog):
        return made, False
    click.echo(f"going on with {len(left.items)} items of a run that was stopped")
    left.path, left.about = made.path, made.about
    left.refused = []  # as the same as an item, which may have changed since
    return left, True


def _saving(
    made: CatalogIndex, partial: Path, show: Callable[[int], None]
) -> Callable[[int], None]:
    """`show` that besides writes now and then what there is to `partial`, which nothing
    serves."""
    due = time.monotonic() + _SAVE_S

    def shown(more: int) -> None:
        nonlocal due
        show(more)
        if time.monotonic() >= due and made.items:
            due = time.monotonic() + _SAVE_S if _keep(made, partial) else math.inf

    return shown


def _keep(made: CatalogIndex, partial: Path) -> bool:
    """Write what there is for a next run; whether it went well. This run needs none."""
    try:
        made.save(partial)
    except InputError as error:
        click.echo(f"stopped now, this run would begin anew: {error.message}", err=True)
        return False
    return True


def open_or_empty(
    output: Path, catalog: Path, descriptor: Descriptor, to_measure: bool = False
) -> CatalogIndex:
    """The index to be brought up to date, or an empty one where there is none of these.

    Raises InputError where the file is there and bad or of quite another catalog, and
    where its measured threshold would be lost, as that of another descriptor, with none
    `to_measure` for it.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    default = Promise(DEFAULT_THRESHOLD, "default: no decoys were given", now, 0)
    about = About(
        descriptor=descriptor.sha256,
        dimensions=descriptor.info.dimensions,
        catalog=str(catalog.resolve()),
        created_at=now,
        promise=default,
    )
    if not os.path.exists(output):
        return CatalogIndex.empty(output, about)
    earlier = load_index(output)
    shut: dict[str, str] = {}
    found = {(Path(name).name, stamp.bytes) for name, stamp in files_in(catalog, shut)}
    before = {(Path(item.name).name, item.bytes) for item in earlier.items.values()}
    if earlier.about.catalog != about.catalog and found and not found & before:
        raise InputError(
            f"{output} is the index of {earlier.about.catalog}, and {catalog} has none of "
            "its files: name that folder, or remove the index to begin anew."
        )
    if earlier.about.descriptor != descriptor.sha256:
        if earlier.about.promise.rate and not to_measure:
            raise InputError(
                f"{output} was made with another descriptor, to which its threshold "
                "belongs: give --others, to measure one for this, or remove the file."
            )
        check_shut(earlier.items.values(), catalog, shut)
        shown = text_of(str(output))
        click.echo(f"{shown} was made with another descriptor: every item is made anew")
        return CatalogIndex.empty(output, about)
    earlier.about = replace(about, promise=earlier.about.promise)
    return earlier


def _report(made: CatalogIndex, done: Update, measured: Measured | None) -> None:
    for folder, reason in done.shut.items():
        click.echo(f"left out {_shown(folder)}: {reason}")
    if done.passed_over:
        click.echo(f"note: {about_names(done.passed_over)}")
    still = {item.name for item in made.items.values()}  # with other content, perhaps
    _say_some(f"removed {_shown(name)}" for name in done.removed if name not in still)
    _say_some(
        f"refused {_shown(refused.name)}: {text_of(refused.reason)}"
        for refused in done.refused
    )
    _say_some(
        f"near-duplicates {_shown(twins.item)} and {_shown(twins.other)} "
        f"(joint score {twins.score:.3f}): a copy of one may be named as the other"
        for twins in sorted(done.twins, key=lambda twins: -twins.score)
    )
    if measured:
        _say_some(
            f"decoy left out {text_of(path)}: {text_of(reason)}"
            for path, reason in measured.left_out.items()
        )
        near = [d for d in measured.decoys if d.score > _NEARLY_COPIES]
        _say_some(
            f"nearest decoy {text_of(decoy.path)}: {_shown(decoy.item)} "
            f"(joint score {decoy.score:.3f})"
            for decoy in measured.decoys[: max(3, len(near))]
        )
        if measured.promise.threshold > _NEARLY_COPIES:
            click.echo(
                "note: a threshold that high comes of pictures among the decoys that look "
                "like copies, see the nearest: take such out and measure again"
            )
        target = measured.promise.target_fpr or 1
        if note := about_support(measured.choosing, measured.samples, target):
            click.echo(f"note: {note}")
    left_out = len(measured.left_out) if measured else 0
    click.echo(
        f"{text_of(str(made.path))}: {len(made.items)} items; {len(done.added)} added, "
        f"{len(done.removed)} removed, {len(done.renamed)} renamed, "
        f"{len(done.refused)} refused, {len(done.twins)} pairs of near-duplicates, "
        f"{left_out} decoys left out"
    )
    click.echo(made.about_promise())


def _say_some(lines: Iterable[str]) -> None:
    """Print the first of these, and how many more there are."""
    said = list(lines)
    for line in said[:_NAMED]:
        click.echo(line)
    if len(said) > _NAMED:
        click.echo(f"... and {len(said) - _NAMED} more")


def _shown(name: str) -> str:
    return text_of(name) if name.isprintable() else repr(text_of(name))


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int], None]]:
    """Counts on a terminal; silent elsewhere."""
    count = 0

    def show(more: int) -> None:
        nonlocal count
        count += more
        if sys.stderr.isatty():
            click.echo(f"\r{count:,} {what}", nl=False, err=True)

    yield show
    if count and sys.stderr.isatty():
        click.echo(err=True)
