"""The joint decision: what cosine, agreement, their product and a margin are worth.

    python bench/joint.py --catalog DIR --others DIR --describe FILE --index FILE
        [--copies 15] [--decoy-versions 2] [--cache FILE]

Copies: so many catalog pictures under each of the 27 edits. Decoys: every look-alike of
`--others` (file names other than `--general`) under so many edits. The index is asked for
the five nearest items of each, and each is confirmed. A copy is found where the item with
the highest score is the right one and reaches the threshold, which lets in the share of
decoys that the column says. Two halves of the decoys, by picture: one chooses the
threshold, the other gives the rate that is reported beside it.
"""

import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pic_daemon.catalog_index import CatalogIndex, load_index
from pic_daemon.confirmation import Landmarks, agreement
from pic_daemon.descriptor import Descriptor, load_descriptor
from pic_daemon.identification import CANDIDATES, Closeup, look_at
from pic_daemon.images import open_rgb
from pic_daemon.indexing import workers
from pic_daemon.promise import rate, threshold_for
from pic_training.edits import EDITS

GENERAL = "caltech,flowers,urban,plasma,drone"
Scores = NDArray[np.float64]
Rule = Callable[[Scores, Scores], Scores]

RULES: dict[str, Rule] = {
    "cosine alone": lambda cosine, _: cosine,
    "agreement alone": lambda _, agreed: agreed,
    "product": lambda cosine, agreed: np.maximum(cosine, 0) * agreed,
    "agreement x cosine^3": lambda cosine, agreed: np.maximum(cosine, 0) ** 3 * agreed,
    "logit(agreement) + 4 cosine": lambda cosine, agreed: logit(agreed) + 4 * cosine,
    "logit(agreement) + 12 cosine": lambda cosine, agreed: logit(agreed) + 12 * cosine,
}


def logit(share: Scores) -> Scores:
    share = np.clip(share, 1e-9, 1 - 1e-9)
    return np.log(share / (1 - share))


def edited(job: tuple[Path, int, int, int]) -> tuple[Closeup, float]:
    path, edit, seed, size = job
    picture, _ = open_rgb(path.read_bytes(), 256)
    picture.thumbnail((512, 512), Image.Resampling.BILINEAR)
    data = EDITS[edit].apply(picture, np.random.default_rng([seed, edit]))
    begun = time.perf_counter()
    return look_at(data, size), time.perf_counter() - begun


def agreed(pair: tuple[Landmarks, list[bytes]]) -> tuple[list[float], float]:
    begun = time.perf_counter()
    values = [agreement(pair[0], Landmarks.from_bytes(item)) for item in pair[1]]
    return values, time.perf_counter() - begun


def collect(
    jobs: list[tuple[Path, int, int]], index: CatalogIndex, descriptor: Descriptor
) -> dict[str, NDArray[np.float64]]:
    """Cosines, agreements, item numbers, each of shape (N, 5), and times in ms."""
    cosines, values, items, times = [], [], [], []
    size = descriptor.info.input_size
    with workers() as pool:
        for part in chunks(iter(jobs), 64):
            seen = list(pool.map(edited, [(*job, size) for job in part], chunksize=4))
            begun = time.perf_counter()
            vectors = descriptor.describe(np.stack([c.image.pixels for c, _ in seen]))
            described = (time.perf_counter() - begun) / len(part)
            near = index.nearest(vectors, CANDIDATES)
            marks = [[index.landmarks(n) for n, _ in found] for found in near]
            pairs = [(c.landmarks, m) for (c, _), m in zip(seen, marks, strict=True)]
            confirmed = list(pool.map(agreed, pairs, chunksize=4))
            cosines += [[similarity for _, similarity in found] for found in near]
            items += [[number for number, _ in found] for found in near]
            values += [value for value, _ in confirmed]
            times += [
                [1000 * looked, 1000 * described, 1000 * took]
                for (_, looked), (_, took) in zip(seen, confirmed, strict=True)
            ]
    return {
        "cosines": np.array(cosines), "agreements": np.array(values),
        "items": np.array(items), "times": np.array(times),
    }  # fmt: skip


def chunks(
    jobs: Iterator[tuple[Path, int, int]], size: int
) -> Iterator[list[tuple[Path, int, int]]]:
    while part := list(islice(jobs, size)):
        yield part


@click.command()
@click.option("--catalog", required=True, type=click.Path(path_type=Path))
@click.option("--others", required=True, type=click.Path(path_type=Path))
@click.option("--general", default=GENERAL, show_default=True)
@click.option("--describe", required=True, type=click.Path(path_type=Path))
@click.option("--index", "index_file", required=True, type=click.Path(path_type=Path))
@click.option("--copies", default=15, show_default=True)
@click.option("--decoy-versions", default=2, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path))
def main(catalog: Path, others: Path, general: str, describe: Path, index_file: Path,
         copies: int, decoy_versions: int, cache: Path | None) -> None:  # fmt: skip
    draw = np.random.default_rng(0)
    index = load_index(index_file)
    by_name = {item.name: number for number, item in index.items.items()}
    names = sorted(by_name)
    drawn = [draw.choice(names, copies, replace=False).tolist() for _ in EDITS]
    right = np.array([by_name[name] for part in drawn for name in part])
    edits = np.repeat(np.arange(len(EDITS)), copies)
    positives = [
        (catalog / name, edit, n)
        for edit, part in enumerate(drawn)
        for n, name in enumerate(part)
    ]
    alike = sorted(
        p for p in others.iterdir() if not p.name.startswith(tuple(general.split(",")))
    )
    decoys = [
        (path, int(edit), n)
        for n, path in enumerate(alike)
        for edit in draw.choice(len(EDITS), decoy_versions, replace=False)
    ]
    if cache and cache.exists():
        stored = np.load(cache)
        found = {k[2:]: stored[k] for k in stored if k.startswith("p_")}
        strangers = {k[2:]: stored[k] for k in stored if k.startswith("d_")}
    else:
        descriptor = load_descriptor(describe)
        found = collect(positives, index, descriptor)
        strangers = collect(decoys, index, descriptor)
        if cache:
            np.savez(
                cache,
                **{f"p_{k}": v for k, v in found.items()},
                **{f"d_{k}": v for k, v in strangers.items()},
            )
    report(found, strangers, right, edits, np.repeat(np.arange(len(alike)), decoy_versions))


def report(
    found: dict[str, Scores], strangers: dict[str, Scores],
    right: NDArray[np.int64], edits: NDArray[np.int64], pictures: NDArray[np.int64],
) -> None:  # fmt: skip
    trained = np.array([edit.trained for edit in EDITS])[edits]
    hit = found["items"] == right[:, None]
    print(f"{len(right)} copies, {len(pictures)} decoy samples of {pictures.max() + 1}")
    first, five = hit[:, 0].mean(), hit.any(axis=1).mean()
    print(f"right item first by cosine {first:.3f}, in five {five:.3f}")
    for name, part in (("trained", trained), ("held out", ~trained)):
        first, five = hit[part, 0].mean(), hit[part].any(1).mean()
        print(f"  {name} edits: {first:.3f}, {five:.3f}")
    times = np.concatenate([found["times"], strangers["times"]]).mean(axis=0)
    print(
        "ms a picture: look closer {:.1f}, describe {:.1f}, confirm {:.1f}".format(*times)
    )
    tested = pictures % 2 == 1
    for name, rule in RULES.items():
        ours = rule(found["cosines"], found["agreements"])
        best = ours.argmax(axis=1)
        named = hit[np.arange(len(right)), best]
        score = ours.max(axis=1)
        theirs = rule(strangers["cosines"], strangers["agreements"]).max(axis=1)
        line = f"{name:<30} named {named.mean():.3f}"
        for target in (0.01, 0.003):
            nothing = np.zeros(int((~tested).sum()), bool)
            threshold = threshold_for(theirs[~tested], nothing, target)
            measured = rate(theirs[tested] >= threshold, pictures[tested])
            good = named & (score >= threshold)
            line += (
                f" | {target:g}: {good[trained].mean():.3f} / {good[~trained].mean():.3f}, "
                f"rate {measured.value:.4f} ({measured.low:.4f} to {measured.high:.4f})"
            )
        print(line)


if __name__ == "__main__":
    main()
