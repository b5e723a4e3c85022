"""Which product, and is it really that one: the figures of the cascade, in one run.

    python bench/identify.py MODEL.onnx --catalog DIR --others DIR --describe FILE
        --index FILE --output DIR [--part figures|gate|cost|curve ...]

`--others` holds pictures that none of the files has learnt from: look-alikes, and general
pictures whose names begin with one of `--general`. The parts:

figures: what `pic-evaluate` measures with these options, its report in `--output`; recall
at lower rates, as far as the samples support them; and what other ways to join cosine and
agreement would have decided on the same scores.
gate: what the classifier lets through at its own gate threshold and at lower ones.
cost: images/s of `pic-classify --recursive` on folders of which 1%, 10% and 100% are
copies, the others general pictures, with the cascade and with the classifier alone; and of
the descriptor with the look-up alone, in batches, a process a core reading.
curve: recall at a false positive rate of 0.001 against CPU milliseconds a picture: how many
candidates are confirmed, and what is described, the whole picture or what lies within its
margins. Pictures one at a time, one thread each; the gate is left out. Writes curve.png.

Prints Markdown. Times are worth something on a machine that does nothing else.
"""

import math
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import matplotlib
import numpy as np
from evaluation import share, tables
from numpy.typing import NDArray
from PIL import Image

from pic_daemon.cascade import Identifier, load_identifier
from pic_daemon.catalog_index import load_index
from pic_daemon.confirmation import agreement
from pic_daemon.descriptor import load_descriptor
from pic_daemon.identification import Candidate, joint_score, look_at
from pic_daemon.images import decode, open_rgb
from pic_daemon.indexing import workers
from pic_daemon.landmarks import Landmarks
from pic_daemon.model import Model, load_model
from pic_daemon.promise import rate, supported_rate, threshold_for
from pic_daemon.reading import read_image
from pic_training.edits import EDITS
from pic_training.evaluation import Evaluation
from pic_training.evaluation_run import run_evaluation
from pic_training.evaluation_scores import Proposed
from pic_training.peers import nearest, peers

matplotlib.use("Agg")
from matplotlib import pyplot

GENERAL = ("caltech", "flowers", "urban", "plasma", "drone")
TRAINED = np.array([edit.trained for edit in EDITS])
RATE = 0.001
RATES = (0.01, 0.001, 0.0001)
PARTS = ("figures", "gate", "cost", "curve")
GATES = (0.2, 0.1, 0.05, 0.01, 0.001)
SHARES = (0.01, 0.1, 1.0)
CONFIRMED = (0, 1, 2, 3, 5, 10)
Scores = NDArray[np.float64]
Rule = Callable[[Scores, Scores], Scores]

_FILE = click.Path(path_type=Path, exists=True)


@click.command()
@click.argument("model", type=_FILE)
@click.option("--catalog", required=True, type=_FILE)
@click.option("--others", required=True, type=_FILE)
@click.option("--describe", required=True, type=_FILE)
@click.option("--index", required=True, type=_FILE)
@click.option("--output", required=True, type=click.Path(path_type=Path))
@click.option("--general", multiple=True, default=GENERAL, show_default=True)
@click.option("--part", "parts", multiple=True, default=PARTS,
              type=click.Choice(PARTS))  # fmt: skip
@click.option("--per-edit", default=200, show_default=True)
@click.option("--per-decoy", default=15, show_default=True)
@click.option("--published", default=1000, show_default=True)
@click.option("--files", default=1000, show_default=True, help="In each folder of `cost`.")
@click.option("--curve-copies", default=15, show_default=True, help="For each edit.")
@click.option("--curve-decoys", default=3, show_default=True, help="Edits of each.")
def main(model: Path, catalog: Path, others: Path, describe: Path, index: Path,
         output: Path, general: tuple[str, ...], parts: tuple[str, ...], per_edit: int,
         per_decoy: int, published: int, files: int, curve_copies: int,
         curve_decoys: int) -> None:  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    items = sorted(item.name for item in load_index(index).items.values())
    pictures = sorted(others.iterdir())
    strangers = [p for p in pictures if p.name.startswith(general)]
    general = tuple(g for g in general if any(p.name.startswith(g) for p in strangers))
    alike = [p for p in pictures if not p.name.startswith(general)]
    if "figures" in parts:
        plan = {"target_fpr": RATE, "per_edit": per_edit, "per_decoy": per_decoy,
                "published": published}  # fmt: skip
        evaluation = run_evaluation(
            model, catalog, others, general, (), output, (describe, index), plan
        )
        tables(output)
        at_rates(evaluation)
        compare_rules(evaluation)
    if "gate" in parts:
        gate(load_model(model), [catalog / name for name in items], strangers, alike)
    if "cost" in parts:
        copies = [catalog / name for name in items]
        cost(model, describe, index, copies, strangers or alike, files)
    if "curve" in parts:
        draw = np.random.default_rng(0)
        copies_of = [
            Task(catalog / name, edit, name)
            for edit in range(len(EDITS))
            for name in draw.choice(items, min(curve_copies, len(items)), False).tolist()
        ]
        decoys = [
            Task(path, int(edit), "")
            for path in alike
            for edit in draw.choice(len(EDITS), curve_decoys, replace=False)
        ]
        curve(
            copies_of,
            decoys,
            [catalog / name for name in items],
            describe,
            index,
            output / "curve.png",
        )


# Figures


def at_rates(evaluation: Evaluation) -> None:
    calibrating = evaluation.hard.calibrating.samples
    pictures = len({sample.picture for sample in calibrating})
    print(
        "\nRecall on trained and held-out edits, and the measured rate, for three aims:\n"
    )
    print("| | " + " | ".join(f"{target:g}" for target in RATES) + " |")
    print("|---" * (len(RATES) + 1) + "|")
    for name in evaluation.methods:
        cells = []
        for target in RATES:
            found = evaluation.hard.at_rate(name, target)
            recalls = (found.trained.recall.value, found.held_out.recall.value)
            measured = found.overall.false_positive_rate.value
            cells.append(f"{recalls[0]:.1%} / {recalls[1]:.1%} ({measured:.3%})")
        print(f"| {name} | {' | '.join(cells)} |")
    lowest = supported_rate(len(calibrating))
    print(
        f"\n{len(calibrating):,} samples of {pictures} look-alikes choose a threshold, so "
        f"{lowest:.2g} is the lowest rate that they support (3 / n; counted by picture "
        f"{supported_rate(pictures):.2g}); where the aim is lower, the threshold is the "
        "first that lets none of them in."
    )


def compare_rules(evaluation: Evaluation) -> None:
    """Other joint scores on the same proposals; right: the item must be the right one."""
    hard = evaluation.hard
    copies, calibrating, decoys = (
        scored.proposed for scored in (hard.positives, hard.calibrating, hard.decoys)
    )
    assert copies and calibrating and decoys
    trained = TRAINED[[sample.edit for sample in hard.positives.samples]]
    pictures = np.array([sample.picture for sample in hard.decoys.samples])
    rules: dict[str, Rule] = {
        "cosine x agreement, as served": np.vectorize(joint_score),
        "cosine alone": lambda cosine, _: cosine,
        "agreement alone": lambda _, agreed: agreed,
        "the lesser of the two": np.minimum,
        **fitted(copies.only(trained), calibrating),
    }
    print(
        "\nOther ways to join cosine and agreement, on the same proposals, no gate; recall "
        "counts copies whose own item comes first and reaches the threshold:\n"
    )
    print("| | right item first | " + " | ".join(f"{r:g}" for r in RATES[:2]) + " |")
    print("|---" * 4 + "|")
    for name, rule in rules.items():
        ours = rule(copies.cosines, copies.agreements)
        best = np.arange(len(ours)), ours.argmax(axis=1)
        right = copies.own[best]
        half, other = (
            rule(d.cosines, d.agreements).max(axis=1) for d in (calibrating, decoys)
        )
        cells = []
        for target in RATES[:2]:
            threshold = threshold_for(half, np.zeros(len(half), bool), target)
            found = right & (ours[best] >= threshold)
            measured = rate(other >= threshold, pictures)
            cells.append(f"{found[trained].mean():.2%} / {found[~trained].mean():.2%} "
                         f"({measured.value:.3%})")  # fmt: skip
        print(f"| {name} | {right.mean():.2%} | {' | '.join(cells)} |")


def fitted(copies: Proposed, decoys: Proposed) -> dict[str, Rule]:
    """A logistic regression on both numbers: each copy's own item, all that decoys meet."""
    rows = [
        np.stack([p.cosines[kept], logit(p.agreements[kept])], axis=1)
        for p, kept in ((copies, copies.own), (decoys, decoys.cosines > 0))
    ]
    x = np.column_stack([np.ones(sum(map(len, rows))), np.concatenate(rows)])
    y = np.arange(len(x)) < len(rows[0])
    weight = np.where(y, 0.5 / len(rows[0]), 0.5 / len(rows[1]))
    w = np.zeros(3)
    for _ in range(50):  # Newton's steps
        p = 1 / (1 + np.exp(-np.clip(x @ w, -30, 30)))
        curvature = x.T @ (x * (weight * p * (1 - p))[:, None]) + 1e-6 * np.eye(3)
        w += np.linalg.solve(curvature, x.T @ (weight * (y - p)) - 1e-6 * w)
    name = f"fitted: {w[1]:.1f} cosine + {w[2]:.2f} logit(agreement)"
    return {name: lambda cosine, agreed: w[1] * cosine + w[2] * logit(agreed)}


def logit(share: Scores) -> Scores:
    share = np.clip(share, 1e-6, 1 - 1e-6)
    return np.asarray(np.log(share / (1 - share)))


# Gate


def gate(model: Model, copies: Sequence[Path], strangers: Sequence[Path],
         alike: Sequence[Path]) -> None:  # fmt: skip
    scores: dict[str, list[Scores]] = {"trained edits": [], "held-out edits": []}
    for number, edit in enumerate(EDITS):
        some = np.random.default_rng(number).choice(len(copies), 60, replace=False)
        scores["trained edits" if edit.trained else "held-out edits"].append(
            gate_scores(model, [copies[n] for n in some], number)
        )
    for name, others in (("general", strangers), ("look-alikes", alike)):
        scores[name] = [gate_scores(model, others[:400], _ALL_THREE)]
    print("\nLet through, 60 copies an edit, the others cropped, resized and compressed:\n")
    print("| gate | " + " | ".join(scores) + " |\n" + "|---" * (len(scores) + 1) + "|")
    own = model.info.gate_threshold
    for least in (own, *(g for g in GATES if g < own)):
        shares = [np.mean(np.concatenate(s) >= least) for s in scores.values()]
        print(f"| {least:.4g} | " + " | ".join(f"{s:.1%}" for s in shares) + " |")


def gate_scores(model: Model, paths: Sequence[Path], edit: int) -> Scores:
    size = model.info.input_size
    files = [edited(path, edit, number) for number, path in enumerate(paths)]
    pixels = np.stack([decode(file, size).pixels for file in files])
    return model.second_score(pixels, math.inf).astype(float)  # all have the second look


# Cost


def cost(model: Path, describe: Path, index: Path, copies: Sequence[Path],
         strangers: Sequence[Path], count: int) -> None:  # fmt: skip
    print(f"\nImages/s on folders of {count:,} files, each cropped, resized and compressed "
          "once more:\n")  # fmt: skip
    print("| copies | classifier alone | cascade | let through | descriptor alone |")
    print("|---" * 5 + "|")
    files = ["--describe", describe, "--index", index]
    for part in SHARES:
        with TemporaryDirectory() as home:
            folder = Path(home) / "folder"
            folder.mkdir()
            for number in range(count):
                of = copies if number < part * count else strangers
                path = of[number % len(of)]
                name = f"{np.random.default_rng(number).integers(1 << 60):x}.jpg"
                (folder / name).write_bytes(edited(path, _ALL_THREE, number))
            alone, _ = classified(model, folder, [])
            cascade, through = classified(model, folder, files)
            described = described_alone(describe, index, folder)
        print(f"| {part:.0%} | {alone:.0f} | {cascade:.1f} | {through:.1%} "
              f"| {described:.1f} |", flush=True)  # fmt: skip


def classified(model: Path, folder: Path, options: Sequence[object]) -> tuple[float, float]:
    """Images/s from the first committed row to the last; the share that was described."""
    with TemporaryDirectory() as home:
        database = Path(home) / "log.db"
        command = [Path(sys.executable).parent / "pic-classify", "--model", model,
                   *options, "--recursive", folder, "--database", database]  # fmt: skip
        subprocess.run([str(c) for c in command], check=True, capture_output=True)
        connection = sqlite3.connect(database)
        rows = connection.execute("SELECT classified_at, catalog_index FROM images")
        times, through = zip(*rows.fetchall(), strict=True)
        connection.close()
    stamps = sorted(datetime.fromisoformat(text).timestamp() for text in times)
    later = sum(stamp > stamps[0] for stamp in stamps)
    return later / (stamps[-1] - stamps[0]), np.mean([t is not None for t in through])


def described_alone(describe: Path, index: Path, folder: Path) -> float:
    descriptor, catalog = load_descriptor(describe), load_index(index)
    paths = [str(path) for path in sorted(folder.iterdir())]
    with workers() as pool:
        sizes = [descriptor.info.input_size] * len(paths)
        list(pool.map(read_image, paths[:8], sizes))  # starts them
        begun = time.perf_counter()
        readings = pool.map(read_image, paths, sizes, chunksize=8)
        while batch := [reading.image.pixels for reading in islice(readings, 32)]:
            catalog.nearest(descriptor.describe(np.stack(batch)), 1)
        return len(paths) / (time.perf_counter() - begun)


# Curve


@dataclass(frozen=True)
class Task:
    """A picture, a position in EDITS, and the catalog item that it is, if it is one."""

    path: Path
    edit: int
    item: str


@dataclass(frozen=True)
class Found:
    """What each step said of a task and took, in CPU ms; views: whole, within margins."""

    views: tuple[list[tuple[str, float, float]], ...]  # item, cosine, agreement
    decode_ms: float
    closeup_ms: float
    describe_ms: float
    agreement_ms: dict[str, float]
    hashes: list[tuple[NDArray[np.uint8] | None, float]]


def curve(copies: list[Task], decoys: list[Task], items: list[Path], describe: Path,
          index: Path, picture: Path) -> None:  # fmt: skip
    context = multiprocessing.get_context("forkserver")
    with context.Pool(os.cpu_count(), start, (describe, index)) as pool:
        found = pool.map(step_by_step, [*copies, *decoys], chunksize=8)
        known = pool.map(hashes_of, items, chunksize=8)
    points: dict[str, list[tuple[float, float]]] = {}
    print(
        f"\nRecall at a false positive rate of {RATE:g} against CPU time, "
        f"{len(copies):,} copies and {len(decoys):,} decoy samples:\n"
    )
    print("| | ms a picture | trained | held-out | measured rate |\n|---|---|---|---|---|")
    judge = Judge(copies, decoys)
    for number, peer in enumerate(peers()):
        of = [one[number][0] for one in known]
        begun = time.process_time()
        scores, _ = nearest([f.hashes[number][0] for f in found], of)
        looked = 1000 * (time.process_time() - begun) / len(found)
        took = np.mean([f.hashes[number][1] for f in found]) + looked
        points[peer.name] = [(took, judge.row(peer.name, took, scores))]
    for view, title in enumerate(("whole picture", "within its margins")):
        points[title] = []
        for confirmed in CONFIRMED:
            nears = [one.views[view][: max(1, confirmed)] for one in found]
            best = [
                max((joint_score(c, a if confirmed else 1), item) for item, c, a in near)
                for near in nears
            ]
            scores = np.array([score for score, _ in best])
            right = np.array([item for _, item in best[: len(copies)]])
            threshold = judge.threshold(scores)
            # the service confirms only what could reach the threshold
            asked = [[i for i, c, _ in near if confirmed and c >= threshold]
                     for near in nears]  # fmt: skip
            times = [
                one.describe_ms + (one.closeup_ms if confirmed else one.decode_ms)
                + sum(one.agreement_ms[item] for item in items_asked)
                for one, items_asked in zip(found, asked, strict=True)
            ]  # fmt: skip
            what = f"{title}, {confirmed or 'none'} confirmed"
            took = float(np.mean(times))
            own = right == np.array([task.item for task in copies])
            points[title].append((took, judge.row(what, took, scores, own)))
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, line in points.items():
        axes.plot(*zip(*line, strict=True), marker="o", label=name)
    for (took, recall), confirmed in zip(line, CONFIRMED, strict=True):
        axes.annotate(str(confirmed), (took, recall), (0, 6), textcoords="offset points")
    axes.set_xlabel("CPU ms a picture (numbers: candidates confirmed)")
    axes.set_ylabel(f"recall at {RATE:g}, all edits")
    axes.set(ylim=(0, 1.05), xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


class Judge:
    """Recall of a score at RATE, the threshold from every second look-alike."""

    def __init__(self, copies: list[Task], decoys: list[Task]) -> None:
        self.trained = TRAINED[[t.edit for t in copies]]
        _, self.pictures = np.unique([str(t.path) for t in decoys], return_inverse=True)
        self.tested = self.pictures % 2 == 1

    def threshold(self, scores: Scores) -> float:
        half = scores[len(self.trained) :][~self.tested]
        return threshold_for(half, np.zeros(len(half), bool), RATE)

    def row(self, name: str, took: float, scores: Scores,
            own: NDArray[np.bool_] | None = None) -> float:  # fmt: skip
        ours, theirs = np.split(scores >= self.threshold(scores), [len(self.trained)])
        found = ours if own is None else ours & own
        measured = rate(theirs[self.tested], self.pictures[self.tested])
        recalls = [found[kind].mean() for kind in (self.trained, ~self.trained)]
        interval = share(asdict(measured))
        print(f"| {name} | {took:.1f} | {recalls[0]:.1%} | {recalls[1]:.1%} | {interval} |")
        return float(found.mean())


_ALL_THREE = next(n for n, e in enumerate(EDITS) if e.family == "crop, scale, JPEG")
_identifier: Identifier


def start(describe: Path, index: Path) -> None:
    global _identifier
    descriptor = load_descriptor(describe, "cpu", threads=1)
    _identifier = Identifier(descriptor, load_identifier(describe, index, "cpu").index)


def step_by_step(task: Task) -> Found:
    data = edited(task.path, task.edit, len(task.path.name))
    size, index = _identifier.descriptor.info.input_size, _identifier.index
    clock = Clock()
    whole = decode(data, size).pixels
    decode_ms = clock.lap()
    closeup = look_at(data, size)
    closeup_ms = clock.lap()
    views: list[list[Candidate]] = []
    for picture in (whole, closeup.pixels):
        vectors = _identifier.descriptor.describe(picture[None])
        views += index.look_up(vectors, max(CONFIRMED))
    describe_ms = clock.lap() / 2
    agreed, agreement_ms = {}, {}
    for candidate in {c.item: c for view in views for c in view}.values():
        item = Landmarks.from_bytes(candidate.landmarks)
        agreed[candidate.item] = agreement(closeup.landmarks, item)
        agreement_ms[candidate.item] = clock.lap()
    return Found(
        tuple([(c.item, c.similarity, agreed[c.item]) for c in view] for view in views),
        decode_ms, closeup_ms, describe_ms, agreement_ms, hashes_in(data),
    )  # fmt: skip


def hashes_of(path: Path) -> list[tuple[NDArray[np.uint8] | None, float]]:
    return hashes_in(path.read_bytes())


def hashes_in(data: bytes) -> list[tuple[NDArray[np.uint8] | None, float]]:
    found = []
    for peer in peers():
        clock = Clock()
        bits = peer.hash(open_rgb(data, 256)[0])
        found.append((bits, clock.lap()))
    return found


class Clock:
    """CPU time of this process between laps, in ms."""

    def __init__(self) -> None:
        self.since = time.process_time()

    def lap(self) -> float:
        before, self.since = self.since, time.process_time()
        return 1000 * (self.since - before)


def edited(path: Path, edit: int, seed: int) -> bytes:
    picture, _ = open_rgb(path.read_bytes(), 256)
    picture.thumbnail((512, 512), Image.Resampling.BILINEAR)
    return EDITS[edit].apply(picture, np.random.default_rng([seed, edit]))


if __name__ == "__main__":
    main()
