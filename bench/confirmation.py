"""How well pixels tell copies of catalog pictures from look-alikes, beside the hashes.

    python bench/confirmation.py --data DIR --weights FILE --work DIR [--fit]
        [--leave-out NAME ...] [--variants]

DIR holds catalog/ and other/{train,val}. Every decoy meets the five catalog pictures
nearest to it by the pooled features of a ResNet50 (`--weights`: a state dict, such as
imgsim's), and counts as a false positive if any of them exceeds the threshold; every
copy meets the picture it was made from. Both go through the same edits. The constants of
`pic_daemon.confirmation` are fitted (`--fit` prints them) and the thresholds chosen on
other/train; all figures come from other/val. `--leave-out` names decoys that were seen
to be copies. `--variants` also measures what each part is worth. Prints Markdown.
"""

import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ[name] = "1"  # one core per worker, so that times are per core

import click  # noqa: E402
import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from PIL import Image  # noqa: E402

from pic_daemon import alignment, confirmation  # noqa: E402
from pic_daemon.confirmation import EVIDENCE  # noqa: E402
from pic_daemon.images import open_rgb  # noqa: E402
from pic_daemon.landmarks import PICTURE_SIDE, Landmarks, landmarks  # noqa: E402
from pic_training.edits import EDITS  # noqa: E402
from pic_training.peers import peers  # noqa: E402

GENERAL = ("caltech", "flowers", "urban", "plasma", "drone")
CANDIDATES = 5
RATES = (1e-2, 1e-3, 3e-4)
OURS = "agreement"
PEERS = [peer for peer in peers() if peer.name in ("pHash", "PDQ")]
TRAINED = np.array([edit.trained for edit in EDITS])


@dataclass(frozen=True)
class Sample:
    """An edited picture and the catalog pictures, by position, that it is held against."""

    path: Path
    edit: int
    seed: int
    copy: bool
    against: tuple[int, ...]


@dataclass(frozen=True)
class Measured:
    """Of N samples: evidence (N, 5, E), NaN where there is none; scores of the hashes (N,);
    milliseconds of CPU time for the landmarks and for a pair (N,)."""

    samples: list[Sample]
    evidence: NDArray[np.float64]
    hashes: dict[str, NDArray[np.float64]]
    marking: NDArray[np.float64]
    pairing: NDArray[np.float64]

    @property
    def copies(self) -> NDArray[np.bool_]:
        return np.array([s.copy for s in self.samples])

    @property
    def edits(self) -> NDArray[np.int64]:
        return np.array([s.edit for s in self.samples])

    @property
    def pictures(self) -> list[str]:
        return [s.path.name for s in self.samples]


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--weights", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--per-decoy", default=8, help="Edits of each decoy of other/val.")
@click.option("--per-edit", default=100, help="Copies under each edit.")
@click.option("--leave-out", multiple=True, help="A decoy that is really a copy.")
@click.option("--fit", is_flag=True, help="Print constants fitted to these pictures.")
@click.option("--variants", is_flag=True, help="Measure what each part is worth.")
@click.option("--seed", default=0)
def main(
    data: Path,
    weights: Path,
    work: Path,
    per_decoy: int,
    per_edit: int,
    leave_out: tuple[str, ...],
    fit: bool,
    variants: bool,
    seed: int,
) -> None:
    work.mkdir(parents=True, exist_ok=True)
    catalog = sorted((data / "catalog").iterdir())
    train, val = (
        [
            p
            for p in sorted((data / "other" / part).iterdir())
            if not p.name.startswith(GENERAL) and p.name not in leave_out
        ]
        for part in ("train", "val")
    )
    features = pooled([*catalog, *val, *train], data, weights, work / "features.npz")
    draw = np.random.default_rng(seed)
    known = [features[p] for p in catalog]

    def drawn(decoys: Sequence[Path], per_decoy: int, per_edit: int) -> list[Sample]:
        seeds = draw.integers(1 << 31)
        near = np.argsort(-np.stack([features[p] for p in decoys]) @ np.stack(known).T)
        return [
            Sample(path, int(edit), int(seeds), False, tuple(map(int, row[:CANDIDATES])))
            for path, row in zip(decoys, near, strict=True)
            for edit in draw.choice(len(EDITS), per_decoy, replace=False)
        ] + [
            Sample(catalog[n], edit, int(seeds), True, (int(n),))
            for edit in range(len(EDITS))
            for n in draw.choice(len(catalog), min(per_edit, len(catalog)), replace=False)
        ]

    calibration = measure(drawn(train, max(1, per_decoy // 4), per_edit // 2), catalog)
    test = measure(drawn(val, per_decoy, per_edit), catalog)
    weights_now = confirmation.WEIGHTS
    if fit:
        weights_now = fitted(calibration)
        print("WEIGHTS =", [round(float(w), 3) for w in weights_now])
    report(calibration, test, weights_now)
    if variants:
        compare_parts(train, val, drawn, catalog)


def pooled(paths: list[Path], data: Path, weights: Path, file: Path) -> dict[Path, Any]:
    """The trunk's features of each picture, float32, length 1; kept in `file`."""
    names = [str(p.relative_to(data)) for p in paths]
    kept: dict[str, Any] = {}
    if file.exists():
        with np.load(file) as found:
            kept = dict(zip(found["names"].tolist(), found["features"], strict=True))
    missing = [n for n in names if n not in kept]
    if missing:
        import torch

        from pic_training.networks import ARCHITECTURES, Normalised

        network = Normalised(ARCHITECTURES["resnet50"], str(weights)).eval()
        torch.set_num_threads(os.cpu_count() or 1)
        for start in range(0, len(missing), 32):
            part = missing[start : start + 32]
            pixels = [
                np.asarray(Image.open(data / n).convert("RGB").resize((224, 224)))
                for n in part
            ]
            with torch.inference_mode():
                found = network.features(torch.from_numpy(np.stack(pixels)))
            found = torch.nn.functional.normalize(found).numpy()
            kept |= dict(zip(part, found.astype(np.float16), strict=True))
        np.savez(file, names=list(kept), features=np.stack(list(kept.values())))
    return {p: kept[n].astype(np.float32) for p, n in zip(paths, names, strict=True)}


_items: list[Landmarks] = []
_hashes: list[list[Any]] = []
_full = True


def measure(
    samples: list[Sample], catalog: list[Path], parts: dict[str, Any] | None = None
) -> Measured:
    context = multiprocessing.get_context("fork")
    made = _catalog(tuple(catalog))
    with context.Pool(os.cpu_count(), _begin, (made, parts or {})) as pool:
        rows = pool.map(_row, samples, 32)
    names = [peer.name for peer in PEERS]
    return Measured(
        samples,
        np.stack([r[0] for r in rows]),
        {}
        if parts
        else {n: np.array([r[1][i] for r in rows]) for i, n in enumerate(names)},
        np.array([r[2] for r in rows]),
        np.array([r[3] for r in rows]),
    )


@cache
def _catalog(pictures: tuple[Path, ...]) -> list[tuple[bytes, list[Any]]]:
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        return pool.map(_item, pictures, 20)


def _item(path: Path) -> tuple[bytes, list[Any]]:
    image = open_rgb(path.read_bytes(), 256)[0]
    return landmarks(image).to_bytes(), [peer.hash(image) for peer in PEERS]


def _begin(made: list[tuple[bytes, list[Any]]], parts: dict[str, Any]) -> None:
    _items[:] = [Landmarks.from_bytes(data) for data, _ in made]
    _hashes[:] = [hashes for _, hashes in made]
    global _full
    _full = not parts
    for name, part in parts.items():
        setattr(confirmation if hasattr(confirmation, name) else alignment, name, part)


def _row(sample: Sample) -> tuple[Any, list[float], float, float]:
    original = open_rgb(sample.path.read_bytes(), 256)[0]
    draw = np.random.default_rng([sample.seed, sample.edit, *sample.path.name.encode()])
    data = EDITS[sample.edit].apply(original, draw)
    image = open_rgb(data, PICTURE_SIDE)[0]
    start = time.process_time()
    query = landmarks(image)
    marked = time.process_time()
    found = [confirmation.evidence(query, _items[n]) for n in sample.against]
    done = time.process_time()
    evidence = np.full((CANDIDATES, len(EVIDENCE)), np.nan)
    for row, values in zip(evidence, found, strict=False):
        if values is not None:
            row[:] = values
    scores = []
    for position, peer in enumerate(PEERS if _full else []):
        bits = peer.hash(open_rgb(data, 256)[0])
        known = [_hashes[n][position] for n in sample.against]
        scores.append(max(_alike(bits, k) for k in known))
    return evidence, scores, 1e3 * (marked - start), 1e3 * (done - marked) / len(found)


def _alike(a: Any, b: Any) -> float:
    if a is None or b is None:
        return 0.0
    return 1 - float(np.bitwise_count(a ^ b).sum()) / (8 * len(a))


def agreements(found: Measured, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The best candidate's agreement (as a logit) for each sample, shape (N,)."""
    logits = found.evidence @ weights[1:] + weights[0]
    return np.asarray(np.where(np.isnan(logits), -99.0, logits).max(axis=1))


def fitted(found: Measured) -> NDArray[np.float64]:
    """Intercept and weights of a logistic regression, copies and decoys alike in sum.

    Copies under the held-out edits take no part.
    """
    import torch

    evidence = found.evidence.reshape(-1, found.evidence.shape[-1])
    copy = np.repeat(found.copies, CANDIDATES)
    seen = ~np.isnan(evidence).any(axis=1)
    seen &= np.repeat(~found.copies | TRAINED[found.edits], CANDIDATES)
    x, y = torch.tensor(evidence[seen]), torch.tensor(copy[seen].astype(float))
    share = torch.where(y > 0, 0.5 / y.sum(), 0.5 / (1 - y).sum())
    mean, spread = x.mean(0), x.std(0)
    z = (x - mean) / spread
    w = torch.zeros(x.shape[1] + 1, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=500, line_search_fn="strong_wolfe")
    loss_of = torch.nn.functional.binary_cross_entropy_with_logits

    def step() -> Any:
        optimizer.zero_grad()
        loss = (share * loss_of(z @ w[1:] + w[0], y, reduction="none")).sum()
        loss = loss + 1e-3 * (w[1:] ** 2).sum()
        loss.backward()
        return loss

    optimizer.step(step)
    slope = w.detach()[1:] / spread
    return np.concatenate([[float(w.detach()[0] - slope @ mean)], slope.numpy()])


def scores_of(found: Measured, weights: NDArray[np.float64]) -> dict[str, Any]:
    return {OURS: agreements(found, weights), **found.hashes}


def limit(decoys: NDArray[np.float64], rate: float) -> float:
    """The score that at most the share `rate` of the decoys exceeds."""
    return float(np.sort(decoys)[::-1][int(rate * len(decoys))])


def report(calibration: Measured, test: Measured, weights: NDArray[np.float64]) -> None:
    chosen, tested = scores_of(calibration, weights), scores_of(test, weights)
    decoys, copies = ~test.copies, test.copies
    print(
        f"{len(set(np.array(test.pictures)[decoys]))} decoys, {decoys.sum()} edited decoys "
        f"x {CANDIDATES} candidates, {copies.sum()} copies; thresholds from "
        f"{(~calibration.copies).sum()} edited decoys of other/train.\n"
        f"Landmarks {np.mean(test.marking):.1f} ms a picture, agreement "
        f"{np.mean(test.pairing[decoys]):.1f} ms a pair of a decoy, "
        f"{np.mean(test.pairing[copies]):.1f} ms of a copy (means of CPU time).\n"
    )
    print("| | rate aimed at | decoys let in (95%) | trained edits | held-out edits |")
    print("|---|---|---|---|---|")
    for name in tested:
        for rate in RATES:
            threshold = limit(chosen[name][~calibration.copies], rate)
            passed = tested[name] > threshold
            low, high = interval(passed[decoys], np.array(test.pictures)[decoys])
            kept = [
                passed[copies & (TRAINED[test.edits] == t)].mean() for t in (True, False)
            ]
            print(
                f"| {name} | {rate:g} | {passed[decoys].mean():.2%} "
                f"({low:.2%} to {high:.2%}) | {kept[0]:.2%} | {kept[1]:.2%} |"
            )
    print(f"\n| edit | {' | '.join(f'{n} at {r:g}' for n in tested for r in RATES[:2])} |")
    print(f"|---|{'---|' * len(tested) * 2}")
    for number, edit in enumerate(EDITS):
        here = copies & (test.edits == number)
        cells = [
            (tested[n][here] > limit(chosen[n][~calibration.copies], r)).mean()
            for n in tested
            for r in RATES[:2]
        ]
        print(f"| {edit.name} | {' | '.join(f'{c:.1%}' for c in cells)} |")
    print(flush=True)
    worst = np.flatnonzero(decoys)[np.argsort(-tested[OURS][decoys])][:10]
    print(
        "\nHighest decoys:", *(f"{test.pictures[n]} {tested[OURS][n]:.1f}" for n in worst)
    )
    lost = np.flatnonzero(copies)[np.argsort(tested[OURS][copies])][:10]
    print(
        "Lowest copies:",
        *(
            f"{test.pictures[n]} ({EDITS[test.edits[n]].name}) {tested[OURS][n]:.1f}"
            for n in lost
        ),
        sep="\n- ",
    )


def interval(passed: NDArray[np.bool_], pictures: NDArray[Any]) -> tuple[float, float]:
    """95% of the share, bootstrapped by picture; none among n pictures: up to 3 / n."""
    names, where = np.unique(pictures, return_inverse=True)
    hits, sizes = np.bincount(where, passed), np.bincount(where)
    if not hits.any():
        return 0.0, 3 / len(names)
    picks = np.random.default_rng(0).integers(0, len(names), (1000, len(names)))
    low, high = np.quantile(hits[picks].sum(1) / sizes[picks].sum(1), [0.025, 0.975])
    return float(low), float(high)


def compare_parts(train: Any, val: Any, drawn: Any, catalog: list[Path]) -> None:
    """Recall against milliseconds: what the search, the features and the rest buy."""
    variants: dict[str, dict[str, Any]] = {
        "all": {},
        "without refinement": {"refined": _unrefined},
        "no search but the whole picture": {"_CROPS": (1.0,), "_FRAMES": ()},
        "no local features": {"_by_features": _no_features},
        "no mirror image": {"align": _unmirrored},
    }
    calibration, test = drawn(train[::4], 1, 10), drawn(val[::2], 3, 20)
    print("\n| parts | ms a decoy pair | ms a copy pair |", end="")
    print(*(f" {k} at {r:g} |" for r in RATES[:2] for k in ("trained", "held out")))
    print("|---|---|---|---|---|---|---|", flush=True)
    for name, parts in variants.items():
        known, found = (measure(s, catalog, parts) for s in (calibration, test))
        print(_line(name, agreements(found, fitted(known)), found), flush=True)
        if not parts:
            for peer, scores in found.hashes.items():
                print(_line(f"{peer} alone", scores, found, timed=False))


def _unrefined(pose: Any, _: Any) -> Any:
    return pose


def _no_features(*_: Any) -> list[Any]:
    return []


def _unmirrored(views: Any, item: Any) -> Any:
    return alignment.align(views[:1], item)


def _line(
    name: str, scores: NDArray[np.float64], found: Measured, timed: bool = True
) -> str:
    decoys, copies = ~found.copies, found.copies
    shares = []
    for rate in RATES[:2]:
        passed = scores > limit(scores[decoys], rate)
        shares += [
            passed[copies & (TRAINED[found.edits] == t)].mean() for t in (True, False)
        ]
    cells = " | ".join(f"{share:.1%}" for share in shares)
    times = [f"{np.mean(found.pairing[kind]):.1f}" for kind in (decoys, copies)]
    return f"| {name} | {' | '.join(times if timed else ['', ''])} | {cells} |"


if __name__ == "__main__":
    main()
