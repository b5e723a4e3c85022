"""What a descriptor is worth by cosine alone, and why it is made as it is.

    python bench/describe.py features --data DIR --weights FILE --work WORK [--minutes 8]
    python bench/describe.py compare --work WORK
    python bench/describe.py recall MODEL.onnx --data DIR --work WORK
    python bench/describe.py kept RUN_DIR --work WORK

DIR holds catalog/, other/train/ and other/val/. `features` keeps what a frozen ResNet50
makes of every sample in WORK; called again it goes on where the minutes ended it.
`compare` tries poolings, stages and losses on them: chosen on a fifth of other/train
that is held back, shown on other/val. `recall` asks an exported descriptor, `kept` the
head of a run on the kept features, in seconds.
"""

import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from pic_training.process import prepare_for_training

prepare_for_training()

import torch  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy, normalize  # noqa: E402
from training import GENERAL  # noqa: E402

from pic_daemon.descriptor import load_descriptor  # noqa: E402
from pic_daemon.images import decode, to_pixels  # noqa: E402
from pic_training.augmentation import Augmentation, sample  # noqa: E402
from pic_training.edits import EDITS  # noqa: E402
from pic_training.evaluation_scores import Sample, sample_file  # noqa: E402
from pic_training.metric_learning import whiten_head  # noqa: E402
from pic_training.networks import (  # noqa: E402
    ARCHITECTURES,
    Describer,
    Normalised,
)
from pic_training.run_folder import load_network  # noqa: E402
from pic_training.sources import Sources, _held_back, gather  # noqa: E402

_FOLDER = click.Path(path_type=Path)
_UNALTERED, _ALTERED = -2, -1  # in place of an edit's number
COPIES = 4
DIMENSIONS = 256
RATES = (0.05, 0.01)

# Columns of the kept features: stage and pooling. GeM: the cube root of the mean cube.
LEVELS = {
    "stage 4, mean": slice(0, 2048),
    "stage 4, GeM": slice(2048, 4096),
    "stage 3, mean": slice(4096, 5120),
    "stage 3, GeM": slice(5120, 6144),
    "stage 2, mean": slice(6144, 6656),
}
BEST = ("stage 4, mean", "stage 3, mean", "stage 2, mean")
COMBINATIONS = (*((name,) for name in LEVELS), BEST[:2], BEST)


@click.group()
def main() -> None:
    pass


def gathered(data: Path, work: Path) -> Sources:
    """The pictures, read once and kept in the work folder."""
    work.mkdir(parents=True, exist_ok=True)
    kept = work / "sources.pkl"
    if not kept.exists():
        folders = (data / "catalog", data / "other" / "train", data / "other" / "val")
        kept.write_bytes(pickle.dumps(gather(*folders, work / "sources.rgb", 224)))
    sources: Sources = pickle.loads(kept.read_bytes())
    return sources


def test_samples(sources: Sources, per_edit: int, per_decoy: int) -> list[Sample]:
    """Catalog pictures under each edit, and the look-alikes of other/val under some."""
    pictures = list(enumerate(sources.pictures))
    catalog = [n for n, p in pictures if p.kind == "catalog"]
    alike = [
        n
        for n, p in pictures
        if p.kind == "other" and p.split == "val"
        and not Path(p.path).name.startswith(GENERAL)
    ]  # fmt: skip
    draw = np.random.default_rng(0)
    samples = [
        Sample(int(n), edit, 0)
        for edit in range(len(EDITS))
        for n in draw.choice(catalog, per_edit, replace=False)
    ]
    return samples + [
        Sample(n, int(edit), 0)
        for n in alike
        for edit in draw.choice(len(EDITS), per_decoy, replace=False)
    ]


def train_samples(sources: Sources) -> list[Sample]:
    """The catalog as it is, altered copies of it, and the others of other/train."""
    catalog = [n for n, p in enumerate(sources.pictures) if p.kind == "catalog"]
    others = [
        n
        for n, p in enumerate(sources.pictures)
        if p.kind == "other" and p.split == "train"
    ]
    return [
        *(Sample(n, _UNALTERED, 0) for n in catalog),
        *(Sample(n, _ALTERED, copy) for copy in range(COPIES) for n in catalog),
        *(Sample(n, _ALTERED, 0) for n in others),
    ]


def render(sources: Sources, wanted: Sample, size: int) -> NDArray[np.uint8]:
    picture = sources.pictures[wanted.picture]
    if wanted.edit == _UNALTERED:
        return to_pixels(sources.image(picture), size)
    if wanted.edit == _ALTERED:
        draw = np.random.default_rng([1, wanted.picture, wanted.number])
        return sample(sources.pixels(picture), draw, Augmentation(), size)
    return decode(sample_file(wanted, picture, sources.file, 0), size).pixels


def rendered(
    sources: Sources, samples: list[Sample], size: int, first: int = 0, batch: int = 32
) -> Iterator[NDArray[np.uint8]]:
    """Batches from number `first` of the samples on; the next is made meanwhile."""

    def make(start: int) -> NDArray[np.uint8]:
        return np.stack([render(sources, s, size) for s in samples[start : start + batch]])

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(make, first)
        for start in range(first, len(samples), batch):
            images = following.result()
            following = pool.submit(make, min(start + batch, len(samples) - 1))
            yield images


class _Features(nn.Module):
    """A ResNet50's stages under several poolings, side by side as LEVELS says."""

    def __init__(self, weights: str) -> None:
        super().__init__()
        self.network = Normalised(ARCHITECTURES["resnet50"], weights).eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        trunk: Any = self.network.trunk
        pixels = images.permute(0, 3, 1, 2).float()
        pixels = (pixels - self.network.mean) / self.network.std
        seen = pixels.contiguous(memory_format=torch.channels_last)
        seen = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(seen))))
        two = trunk.layer2(trunk.layer1(seen))
        three = trunk.layer3(two)
        four = trunk.layer4(three)
        parts = [_mean(four), _gem(four), _mean(three), _gem(three), _mean(two)]
        return torch.cat(parts, dim=1)


def _mean(seen: torch.Tensor) -> torch.Tensor:
    return seen.float().mean((2, 3))


def _gem(seen: torch.Tensor) -> torch.Tensor:
    return seen.float().clamp_min(1e-6).pow(3).mean((2, 3)).pow(1 / 3)


@main.command()
@click.option("--data", required=True, type=_FOLDER)
@click.option("--weights", required=True)
@click.option("--work", required=True, type=_FOLDER)
@click.option("--size", default=160, show_default=True)
@click.option("--minutes", default=60.0, show_default=True)
def features(data: Path, weights: str, work: Path, size: int, minutes: float) -> None:
    sources = gathered(data, work)
    end = time.monotonic() + 60 * minutes
    network = _Features(weights).to(memory_format=torch.channels_last)
    for part, samples in (
        ("train", train_samples(sources)),
        ("test", test_samples(sources, 60, 10)),
    ):
        path, done_file = work / f"{part}{size}.npy", work / f"{part}{size}.done"
        done = int(done_file.read_text()) if done_file.exists() else 0
        mode, shape = "r+" if path.exists() else "w+", (len(samples), 6656)
        kept = np.lib.format.open_memmap(path, mode, np.float16, shape)
        if done == len(samples):
            continue
        begun, before = time.monotonic(), done
        for images in rendered(sources, samples, size, done):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                made = network(torch.from_numpy(images))
            kept[done : done + len(images)] = made.numpy()
            done += len(images)
            if time.monotonic() > end:
                break
        kept.flush()
        done_file.write_text(str(done))
        rate = (done - before) / (time.monotonic() - begun)
        click.echo(f"{part}: {done:,} of {len(samples):,}, {rate:.0f} images/s")


@dataclass(frozen=True)
class Kept:
    """Features of one part with the picture, and the edit, behind each row."""

    features: torch.Tensor
    picture: NDArray[np.int64]
    edit: NDArray[np.int64]
    number: NDArray[np.int64]

    def levels(self, names: tuple[str, ...]) -> torch.Tensor:
        """Each level of length one, side by side, as the network has them."""
        parts = [normalize(self.features[:, LEVELS[name]], dim=1) for name in names]
        return torch.cat(parts, dim=1)


def _kept(work: Path, part: str, samples: list[Sample]) -> Kept:
    columns = np.array([(s.picture, s.edit, s.number) for s in samples]).T
    stored = np.load(work / f"{part}160.npy").astype(np.float32)
    return Kept(torch.from_numpy(stored), *columns)


@dataclass(frozen=True)
class Figures:
    """Top-1 and recall, on edits that were trained and on held-out ones."""

    top_1: tuple[float, float]
    recall: tuple[float, float]
    rate: float
    per_edit: list[tuple[float, float]]


def figures(
    sources: Sources,
    picture: NDArray[np.int64],
    edit: NDArray[np.int64],
    cosines: NDArray[np.float32],
    items: NDArray[np.int64],
    target: float = 0.001,
) -> Figures:
    """The threshold from one half of the look-alikes, by group; all else on the other.

    `cosines` (N, C) to the catalog, whose pictures `items` (C,) numbers. A copy is
    found where the cosine to its own item is above the threshold.
    """
    is_copy = np.isin(picture, items)
    groups = sorted({sources.pictures[n].group for n in set(picture[~is_copy].tolist())})
    tested = set(groups[1::2])
    test = np.array([sources.pictures[n].group in tested for n in picture])
    greatest = cosines.max(1)
    shut_out = np.sort(greatest[~is_copy & ~test])[::-1]
    threshold = shut_out[int(target * len(shut_out))]
    place = {int(n): c for c, n in enumerate(items)}
    own = np.array([place.get(int(n), -1) for n in picture])
    named = cosines.argmax(1) == own
    found = cosines[np.arange(len(own)), own.clip(0)] > threshold
    trained = np.array([e.trained for e in EDITS])

    def share(what: NDArray[np.bool_], chosen: NDArray[np.bool_]) -> float:
        return float(what[is_copy & chosen].mean())

    halves = [trained[edit], ~trained[edit]]
    return Figures(
        (share(named, halves[0]), share(named, halves[1])),
        (share(found, halves[0]), share(found, halves[1])),
        float((greatest[~is_copy & test] > threshold).mean()),
        [(share(named, edit == n), share(found, edit == n)) for n in range(len(EDITS))],
    )


@dataclass(frozen=True)
class Bench:
    """All that a comparison needs; `train` rows fall into masks over them."""

    sources: Sources
    train: Kept
    test: Kept
    originals: NDArray[np.bool_]
    queries: NDArray[np.bool_]
    fitted: NDArray[np.bool_]
    decoys: NDArray[np.bool_]

    def describe(self, name: str, embed: Callable[[Kept], torch.Tensor]) -> None:
        """Print a row of the table."""
        train, test = embed(self.train), embed(self.test)
        catalog = train[self.originals]
        items = self.train.picture[self.originals]
        queries = (train[self.queries] @ catalog.T).numpy()
        own = np.searchsorted(items, self.train.picture[self.queries])
        top_1 = (queries.argmax(1) == own).mean()
        decoys = np.sort((train[self.decoys] @ catalog.T).numpy().max(1))[::-1]
        at_own = queries[np.arange(len(own)), own]
        held = [float((at_own > decoys[int(r * len(decoys))]).mean()) for r in RATES]
        shown = figures(
            self.sources, self.test.picture, self.test.edit,
            (test @ catalog.T).numpy(), items,
        )  # fmt: skip
        row = [top_1, *held, *shown.top_1, *shown.recall]
        click.echo(f"| {name} | " + " | ".join(f"{v:.1%}" for v in row) + " |")


def _bench(work: Path) -> Bench:
    sources = gathered(work, work)
    train = _kept(work, "train", train_samples(sources))
    test = _kept(work, "test", test_samples(sources, 60, 10))
    pictures = sources.pictures
    others = [p for p in pictures if p.kind == "other" and p.split == "train"]
    groups = _held_back([p.group for p in others])
    catalog = np.array([pictures[n].kind == "catalog" for n in train.picture])
    alike = [not Path(p.path).name.startswith(GENERAL) for p in pictures]
    held = np.array([pictures[n].group in groups for n in train.picture]) & ~catalog
    queries = catalog & (train.number == COPIES - 1)
    return Bench(
        sources,
        train,
        test,
        originals=train.edit == _UNALTERED,
        queries=queries,
        fitted=~held & ~queries,
        decoys=held & np.array(alike)[train.picture],
    )


def _whitened(bench: Bench, names: tuple[str, ...]) -> nn.Linear:
    features = bench.train.levels(names)[bench.fitted]
    labels = torch.from_numpy(bench.train.picture[bench.fitted])
    # The head alone: a trunk would not be asked.
    network = Describer.__new__(Describer)
    nn.Module.__init__(network)
    network.head = nn.Linear(features.shape[1], DIMENSIONS)
    whiten_head(network, features, labels)
    return network.head


def _embed(head: nn.Linear, names: tuple[str, ...]) -> Callable[[Kept], torch.Tensor]:
    def embed(kept: Kept) -> torch.Tensor:
        with torch.no_grad():
            unit = normalize(kept.levels(names), dim=1)
            return normalize(head(unit), dim=1)

    return embed


def _as_it_is(names: tuple[str, ...]) -> Callable[[Kept], torch.Tensor]:
    return lambda kept: normalize(kept.levels(names), dim=1)


Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def info_nce(temperature: float) -> Loss:
    def loss(embeddings: torch.Tensor, labels: torch.Tensor, _: Any) -> torch.Tensor:
        similar = embeddings @ embeddings.T / temperature
        itself = torch.eye(len(labels), dtype=torch.bool)
        share = similar - similar.masked_fill(itself, -torch.inf).logsumexp(1, True)
        copies = (labels[:, None] == labels) & ~itself
        return -(share * copies).sum() / copies.sum()

    return loss


def triplet(margin: float) -> Loss:
    """The farthest copy against the nearest other picture (Hermans et al. 2017)."""

    def loss(embeddings: torch.Tensor, labels: torch.Tensor, _: Any) -> torch.Tensor:
        similar = embeddings @ embeddings.T
        same = labels[:, None] == labels
        itself = torch.eye(len(labels), dtype=torch.bool)
        copy = similar.masked_fill(~same | itself, 9).min(1).values
        other = similar.masked_fill(same, -9).max(1).values
        return torch.relu(other - copy + margin)[copy < 9].mean()

    return loss


def proxies(temperature: float, margin: float) -> Loss:
    """A learned centre for each picture; with a margin ArcFace (Deng et al. 2019)."""

    def loss(
        embeddings: torch.Tensor, labels: torch.Tensor, centres: torch.Tensor
    ) -> torch.Tensor:
        cosines = embeddings @ normalize(centres, dim=1).T
        row = torch.arange(len(labels))
        own = (cosines[row, labels].clamp(-0.999, 0.999).acos() + margin).cos()
        cosines = cosines.index_put((row, labels), own)
        return cross_entropy(cosines / temperature, labels)

    return loss


def _train(
    bench: Bench, start: nn.Linear, loss: Loss, lr: float, random: bool, others: int
) -> nn.Linear:
    """200 steps of Adam with 512 catalog samples (pairs) and `others` others each."""
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    head = nn.Linear(start.in_features, DIMENSIONS)
    if not random:
        head.load_state_dict(start.state_dict())
    features = normalize(bench.train.levels(BEST), dim=1)
    _, labels = torch.unique(torch.from_numpy(bench.train.picture), return_inverse=True)
    with torch.no_grad():
        embedded = normalize(head(features), dim=1)
        centres = torch.zeros(int(labels.max()) + 1, DIMENSIONS)
        centres = normalize(centres.index_add_(0, labels, embedded), dim=1)
    centres.requires_grad_()
    optimizer = torch.optim.Adam([*head.parameters(), centres], lr)
    catalog = {
        n: np.flatnonzero((bench.train.picture == n) & bench.fitted)
        for n in bench.train.picture[bench.originals]
    }
    decoys = np.flatnonzero(
        bench.fitted & ~np.isin(bench.train.picture, list(catalog)),
    )
    steps = 200
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + np.cos(np.pi * step / steps)) / 2
        items = draw.choice(list(catalog), 256, replace=False)
        pairs = [draw.choice(catalog[n], 2, replace=False) for n in items]
        chosen = np.concatenate([*pairs, draw.choice(decoys, others, replace=False)])
        rows = torch.from_numpy(chosen)
        optimizer.zero_grad()
        value = loss(normalize(head(features[rows]), dim=1), labels[rows], centres)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return head


@main.command()
@click.option("--work", required=True, type=_FOLDER)
def compare(work: Path) -> None:
    bench = _bench(work)
    click.echo("| | held back: top-1 | recall at 5% | at 1% | trained edits: top-1 "
               "| held-out | recall at 0.1%: trained | held-out |")  # fmt: skip
    click.echo("|---" * 8 + "|")
    for names in COMBINATIONS:
        title = " + ".join(names)
        bench.describe(
            f"{title}, as it is", lambda kept, n=names: kept.levels(n) / len(n) ** 0.5
        )
        head = _whitened(bench, names)
        bench.describe(f"{title}, whitened to {DIMENSIONS}", _embed(head, names))
    trials: dict[str, tuple[Loss, float, bool, int]] = {
        "InfoNCE 0.07, lr 1e-3, random start": (info_nce(0.07), 1e-3, True, 512),
        "InfoNCE 0.07, lr 1e-3": (info_nce(0.07), 1e-3, False, 512),
        "InfoNCE 0.07, lr 1e-4": (info_nce(0.07), 1e-4, False, 512),
        "InfoNCE 0.03, lr 1e-4": (info_nce(0.03), 1e-4, False, 512),
        "InfoNCE 0.15, lr 1e-4": (info_nce(0.15), 1e-4, False, 512),
        "InfoNCE 0.07, lr 1e-4, 2,048 others": (info_nce(0.07), 1e-4, False, 2048),
        "triplet, margin 0.2, lr 1e-4": (triplet(0.2), 1e-4, False, 512),
        "proxies 0.07, lr 1e-4": (proxies(0.07, 0.0), 1e-4, False, 512),
        "ArcFace 0.07, margin 0.3, lr 1e-4": (proxies(0.07, 0.3), 1e-4, False, 512),
    }
    for name, (loss, lr, random, others) in trials.items():
        trained = _train(bench, head, loss, lr, random, others)
        bench.describe(name, _embed(trained, BEST))


@main.command()
@click.argument("model", type=_FOLDER)
@click.option("--data", required=True, type=_FOLDER)
@click.option("--work", required=True, type=_FOLDER)
@click.option("--per-edit", default=40, show_default=True)
@click.option("--per-decoy", default=8, show_default=True)
def recall(model: Path, data: Path, work: Path, per_edit: int, per_decoy: int) -> None:
    sources = gathered(data, work)
    descriptor = load_descriptor(model, "cpu")
    size = descriptor.info.input_size
    samples = test_samples(sources, per_edit, per_decoy)
    items = [n for n, p in enumerate(sources.pictures) if p.kind == "catalog"]

    def described(wanted: list[Sample]) -> NDArray[np.float32]:
        batches = rendered(sources, wanted, size)
        return np.concatenate([descriptor.describe(images) for images in batches])

    begun = time.monotonic()
    catalog = described([Sample(n, _UNALTERED, 0) for n in items])
    cosines = described(samples) @ catalog.T
    rate = (len(items) + len(samples)) / (time.monotonic() - begun)
    click.echo(f"{len(items) + len(samples):,} images, {rate:.0f} images/s")
    _print(sources, samples, cosines, np.array(items))


@main.command()
@click.argument("run", type=_FOLDER)
@click.option("--work", required=True, type=_FOLDER)
def kept(run: Path, work: Path) -> None:
    """What `recall` does, for the head of a run whose trunk stayed as it was."""
    bench = _bench(work)
    _, network = load_network(run)
    embed = _embed(network.head, BEST[::-1])  # the network has the earliest stage first
    cosines = (embed(bench.test) @ embed(bench.train)[bench.originals].T).numpy()
    items = bench.train.picture[bench.originals]
    _print(bench.sources, test_samples(bench.sources, 60, 10), cosines, items)


def _print(
    sources: Sources,
    samples: list[Sample],
    cosines: NDArray[np.float32],
    items: NDArray[np.int64],
) -> None:
    columns = np.array([(s.picture, s.edit) for s in samples]).T
    found = figures(sources, columns[0], columns[1], cosines, items)
    copies = int(np.isin(columns[0], items).sum())
    click.echo(f"{copies:,} copies, {len(samples) - copies:,} look-alike decoys; measured "
               f"false positive rate {found.rate:.3%}")  # fmt: skip
    click.echo("\n| | top-1 | recall at 0.001 |\n|---|---|---|")
    rows = zip(("trained edits", "held-out edits"), found.top_1, found.recall, strict=True)
    per_edit_rows = [(e.name, *v) for e, v in zip(EDITS, found.per_edit, strict=True)]
    for name, named, share in (*rows, *per_edit_rows):
        click.echo(f"| {name} | {named:.1%} | {share:.1%} |")


if __name__ == "__main__":
    main()
