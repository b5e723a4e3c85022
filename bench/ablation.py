"""What each way of training the CNN is worth, one change at a time.

    python bench/ablation.py --data DIR --decoys general --work DIR [--samples 24000]
    python bench/ablation.py --data DIR --decoys general --work DIR \
        --pictures 0.25 --samples 230000

DIR holds catalog/, others/train/ and others/val/ (or other/). Samples are rendered once
and shared by all variants, so that the table takes minutes; each variant sees every
sample once, as in one epoch. With a quarter of the pictures to train on, 230,000 samples
show each as often as five epochs of the published scale do all of them: what a network
makes of pictures that it has seen too often shows there. Prints a Markdown table.
"""

import copy
import math
import time
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path

import click

from pic_training.process import prepare_for_training

prepare_for_training()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import (  # noqa: E402
    binary_cross_entropy_with_logits,
    dropout,
)
from training import choose  # noqa: E402

from pic_training.augmentation import Augmentation  # noqa: E402
from pic_training.networks import ARCHITECTURES, Naming, Normalised, Recogniser  # noqa: E402
from pic_training.samples import SampleSet  # noqa: E402
from pic_training.sources import Split, gather  # noqa: E402

CNN = ARCHITECTURES["cnn"]


@dataclass(frozen=True)
class Variant:
    """How to train. `repeats` goes over a share of the samples several times instead of
    over all once; `naming` is that of pic-train, in the end zero if `naming_falls`; `hard`
    is the share of the decoys that is drawn again from those with the highest loss;
    `mirror` turns half of all samples left to right; `blend` is the share of the decoys
    that is laid over another; `varied` makes new decoys of old: half of them mirrored, a
    third with their colour channels in another order, and the share `halved` with another's
    half in the place of their own; `gamma` is the share of these whose channels are each
    bent by an exponent of their own; `own` is the share of the decoys that are catalog
    pictures, recoloured, mirrored and turned upside down, each with the probability that
    `own_...` says. `decoy_area` is the least share of its area that a decoy is cropped
    to; `turned` is the share of the decoys that is turned by one, two or three quarters.
    `mixup` is the parameter of the Beta distribution by which pictures and labels of a
    batch are blended (Zhang et al. 2018). `erased` is the share of all samples in which a
    box is painted over (Zhong et al. 2017); `sam` is the radius within which the weights
    are first moved to where the loss is highest (Foret et al. 2020); `arch` is that of
    pic-train, and decides what `naming` does."""

    lr: float = 0.08
    batch: int = CNN.batch_size
    momentum: float = 0.0
    weight_decay: float = 0.0
    warmup: float = 0.0
    cosine: bool = True
    smoothing: float = 0.0
    dropout: float = 0.0
    ema: float = 0.0
    naming: float = 0.0
    naming_falls: bool = False
    hard: float = 0.0
    repeats: int = 1
    adamw: bool = False
    pooled: bool = False
    mirror: bool = False
    blend: float = 0.0
    varied: bool = False
    halved: float = 1 / 3
    gamma: float = 0.0
    own: float = 0.0
    own_mirrored: float = 0.5
    own_recoloured: float = 0.0
    own_upside: float = 1.0
    decoy_area: float = 0.5
    turned: float = 0.0
    mixup: float = 0.0
    erased: float = 0.0
    sam: float = 0.0
    arch: str = "cnn"
    seed: int = 0


DEFAULT = Variant()
RECOLOURED = replace(DEFAULT, varied=True, halved=0.0)
BENT = replace(RECOLOURED, gamma=0.5)
BOTH = replace(RECOLOURED, decoy_area=0.1, gamma=0.5)
RESNET8 = replace(BENT, arch="resnet8", lr=0.05, momentum=0.9, weight_decay=5e-4, batch=64)
ADAMW = replace(DEFAULT, adamw=True, lr=0.0005, batch=128)
VARIANTS = {
    "default: SGD, half cosine, fresh samples": DEFAULT,
    "the same, another seed": replace(DEFAULT, seed=1),
    "constant rate": replace(DEFAULT, cosine=False),
    "warm-up over a tenth": replace(DEFAULT, warmup=0.1),
    "momentum 0.9, a tenth of the rate": replace(DEFAULT, momentum=0.9, lr=0.008, batch=64),
    "AdamW, 0.0005, batch 128": ADAMW,
    "batch 64, rate 0.1": replace(DEFAULT, batch=64, lr=0.1),
    "weight decay 0.0005": replace(DEFAULT, weight_decay=5e-4),
    "label smoothing 0.1": replace(DEFAULT, smoothing=0.1),
    "dropout 0.5 before the head": replace(DEFAULT, dropout=0.5),
    "EMA 0.998": replace(DEFAULT, ema=0.998),
    "hard decoys, a third drawn again": replace(DEFAULT, hard=1 / 3),
    "--naming 0.4": replace(DEFAULT, naming=0.4),
    "a quarter of the samples, four times": replace(DEFAULT, repeats=4),
    "max-pooling after each convolution": replace(DEFAULT, pooled=True),
    "half of the samples mirrored": replace(DEFAULT, mirror=True),
    "half of the decoys blended": replace(DEFAULT, blend=0.5),
    "varied decoys": replace(DEFAULT, varied=True),
    "decoys mirrored and recoloured": RECOLOURED,
    "decoys mirrored and recoloured, --naming 1": replace(RECOLOURED, naming=1.0),
    "those, cropped to a tenth besides": replace(RECOLOURED, decoy_area=0.1),
    "those, half of them bent besides": BENT,
    "those, half of them bent besides, --naming 1": replace(BENT, naming=1.0),
    "bent, a quarter the catalog's upside down": replace(BENT, own=0.25),
    "bent, half the catalog's upside down": replace(BENT, own=0.5),
    "bent, a quarter the catalog's mirrored": replace(
        BENT, own=0.25, own_upside=0.0, own_mirrored=1.0, own_recoloured=0.5
    ),
    "bent, a quarter the catalog's recoloured": replace(
        BENT, own=0.25, own_upside=0.0, own_recoloured=1.0
    ),
    "bent, half of them turned besides": replace(BENT, turned=0.5),
    "bent, mixup 0.4": replace(BENT, mixup=0.4),
    "bent, half of the samples erased": replace(BENT, erased=0.5),
    "bent, dropout 0.5": replace(BENT, dropout=0.5),
    "bent, SAM 0.05": replace(BENT, sam=0.05),
    "bent, resnet8": RESNET8,
    "bent, resnet8, --naming 1": replace(RESNET8, naming=1.0),
    "those, both": BOTH,
    "those, both, --naming 0.4": replace(BOTH, naming=0.4),
    "those, both, --naming 1": replace(BOTH, naming=1.0),
    "those, both, --naming 2": replace(BOTH, naming=2.0),
    "those, both, --naming 2, falling to 0": replace(BOTH, naming=2.0, naming_falls=True),
    "AdamW, dropout 0.5": replace(ADAMW, dropout=0.5),
    "AdamW, weight decay 0.1": replace(ADAMW, weight_decay=0.1),
    "AdamW, half of the samples mirrored": replace(ADAMW, mirror=True),
    "AdamW, half of the decoys blended": replace(ADAMW, blend=0.5),
}


@dataclass(frozen=True)
class Data:
    """Rendered samples: images uint8 (N, 64, 64, 3), odd ones of the catalog, whose
    picture is numbered by `items`; `train` by the least area that decoys are cropped to."""

    train: dict[float, torch.Tensor]
    items: torch.Tensor
    val: torch.Tensor


@click.command()
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True))
@click.option(
    "--decoys", type=click.Choice(["general", "look-alike", "all"]), required=True
)
@click.option("--work", required=True, type=click.Path(path_type=Path))
@click.option("--samples", type=int, default=24_000, show_default=True)
@click.option("--pictures", type=float, default=1.0, show_default=True,
              help="Share of the pictures trained on that takes part.")  # fmt: skip
@click.option("--only", multiple=True, help="Variants whose name holds this.")
def main(
    data: Path, decoys: str, work: Path, samples: int, pictures: float,
    only: tuple[str, ...],
) -> None:  # fmt: skip
    variants = {
        name: variant
        for name, variant in VARIANTS.items()
        if not only or any(part in name for part in only)
    }
    areas = {variant.decoy_area for variant in variants.values()}
    prepared = prepare(data, decoys, work, samples, pictures, areas)
    print("| | accuracy | loss | recall at 0.1 | at 0.01 | at 0.001 | images/s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name, variant in variants.items():
        print(f"| {name} | {row(variant, prepared)} |", flush=True)


def prepare(data: Path, decoys: str, work: Path, samples: int, share: float,
            areas: set[float]) -> Data:  # fmt: skip
    others = data / ("others" if (data / "others").exists() else "other")
    for split in ("train", "val"):
        choose(others / split, work / f"others-{split}", decoys)
    sources = gather(
        data / "catalog", work / "others-train", work / "others-val",
        work / "sources.rgb", 64,
    )  # fmt: skip
    every = round(1 / share)
    kept = [p for p in sources.pictures if p.split == "val"]
    for kind in ("catalog", "other"):
        some = [p for p in sources.pictures if p.kind == kind and p.split == "train"]
        kept += some[::every]
    sources = replace(sources, pictures=tuple(kept))

    def render(split: Split, count: int, area: float = 0.5) -> torch.Tensor:
        ranges = Augmentation(variety=False, crop_area=(area, 1.0))
        rendered = SampleSet(sources, split, count, CNN.size, 0, ranges)
        return torch.cat([batch for batch, _ in rendered.load(0, 64, 2)])

    plain = render("train", samples)
    train = {0.5: plain}
    for area in areas - {0.5}:
        train[area] = plain.clone()
        train[area][::2] = render("train", samples, area)[::2]
    order = SampleSet(sources, "train", samples, CNN.size, 0, Augmentation()).order(
        "catalog", 0
    )
    number = {p.path: n for n, p in enumerate(sources.of("catalog", "train"))}
    items = [number[order[i // 2 % len(order)].path] for i in range(samples)]
    return Data(train, torch.tensor(items), render("val", min(10_000, samples // 4)))


def row(variant: Variant, data: Data) -> str:
    started = time.monotonic()
    network = train(variant, data)
    speed = len(data.items) / (time.monotonic() - started)
    with torch.no_grad():
        logits = torch.cat([network(part) for part in data.val.split(500)])
    labels = torch.arange(len(logits)) % 2
    loss = binary_cross_entropy_with_logits(logits, labels.float())
    accuracy = ((logits > 0) == (labels > 0)).float().mean()
    decoys = np.sort(logits[labels == 0].numpy())[::-1]
    recalls = [
        float((logits[labels == 1] > decoys[int(rate * len(decoys))].item()).float().mean())
        for rate in (0.1, 0.01, 0.001)
    ]
    cells = [f"{accuracy:.1%}", f"{loss:.3f}", *(f"{r:.1%}" for r in recalls)]
    return " | ".join([*cells, f"{speed:.0f}"])


def train(variant: Variant, data: Data) -> Normalised:
    torch.manual_seed(variant.seed)
    samples = data.train[variant.decoy_area]
    items = int(data.items.max()) + 1
    network = network_of(variant, items).to(memory_format=torch.channels_last)
    naming = Naming(network, items if variant.naming else 1)
    parameters = [*(naming if variant.naming else network).parameters()]
    optimizer = optimizer_of(variant, parameters)
    average = copy.deepcopy(network) if variant.ema else network
    steps = len(samples) // variant.batch
    some = torch.arange(steps // variant.repeats * variant.batch)
    order = some.repeat(variant.repeats)
    for step in range(len(order) // variant.batch):
        index = order[step * variant.batch : (step + 1) * variant.batch]
        images, labels = altered(samples[index], variant), (index % 2).float()
        if variant.mixup:
            images, labels = mixed(images, labels, variant.mixup)
        for group in optimizer.param_groups:
            group["lr"] = rate(variant, step / steps)
        optimizer.zero_grad()
        moved = climbed(network, images, labels, variant.sam) if variant.sam else []
        with torch.autocast("cpu", torch.bfloat16):
            features = network.features(images)
            features = dropout(features, variant.dropout)
            logits, names = naming.name(features)
        target = labels * (1 - variant.smoothing) + variant.smoothing / 2
        losses = binary_cross_entropy_with_logits(logits.float(), target, reduction="none")
        loss = losses.mean()
        if variant.naming:
            weight = variant.naming * (1 - step / steps if variant.naming_falls else 1)
            items_seen = torch.where(index % 2 > 0, data.items[index] + 1, 0)
            loss = loss + weight / len(index) * naming.loss(names, items_seen)
        loss.backward()
        if variant.sam:
            with torch.no_grad():
                for parameter, by in zip(network.parameters(), moved, strict=True):
                    parameter.sub_(by)
        optimizer.step()
        if variant.hard:
            again(order, index, losses.detach(), step, variant)
        if variant.ema:
            with torch.no_grad():
                for mean, new in zip(average.parameters(), parameters, strict=True):
                    mean.lerp_(new, 1 - variant.ema)
    return average.eval()


def network_of(variant: Variant, items: int) -> Normalised:
    if variant.pooled:
        return Normalised(replace(CNN, trunk=pooled_trunk))
    architecture = ARCHITECTURES[variant.arch]
    if architecture.prototypes and variant.naming:
        return Recogniser(architecture, "none", items)
    return Normalised(architecture)


def optimizer_of(variant: Variant, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if variant.adamw:
        return torch.optim.AdamW(
            parameters, variant.lr, weight_decay=variant.weight_decay, fused=True
        )
    return torch.optim.SGD(
        parameters, variant.lr, variant.momentum,
        weight_decay=variant.weight_decay, fused=True,
    )  # fmt: skip


def climbed(
    network: Normalised, images: torch.Tensor, labels: torch.Tensor, radius: float
) -> list[torch.Tensor]:
    """Move the weights so far towards a higher loss; returns by how much each was."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = network.head(network.features(images)).squeeze(1).float()
    binary_cross_entropy_with_logits(logits, labels).backward()
    with torch.no_grad():
        parameters = list(network.parameters())
        slopes = [p.grad.clone() for p in parameters if p.grad is not None]
        length = torch.nn.utils.get_total_norm(slopes)
        for parameter, slope in zip(parameters, slopes, strict=True):
            parameter.add_(slope.mul_(radius / (length + 1e-12)))
    network.zero_grad()
    return slopes


def rate(variant: Variant, share: float) -> float:
    if share < variant.warmup:
        return variant.lr * share / variant.warmup
    if not variant.cosine:
        return variant.lr
    share = (share - variant.warmup) / (1 - variant.warmup)
    return variant.lr * (1 + math.cos(math.pi * share)) / 2


def again(
    order: torch.Tensor, index: torch.Tensor, losses: torch.Tensor, step: int,
    variant: Variant,
) -> None:  # fmt: skip
    """Put the worst decoys of this batch in the place of some 50 steps later."""
    decoys = (index % 2 == 0).nonzero().squeeze(1)
    worst = index[decoys[losses[decoys].argsort(descending=True)]]
    start = (step + 50) * variant.batch
    places = torch.arange(start, start + variant.batch, 2)
    places = places[: round(variant.hard * len(places))]
    places = places[places < len(order)]
    order[places] = worst[: len(places)]


def altered(images: torch.Tensor, variant: Variant) -> torch.Tensor:
    """A batch, even ones decoys, once `variant` has mirrored and mixed it."""
    if variant.mirror:
        images[::4] = images[::4].flip(2)
        images[1::4] = images[1::4].flip(2)
    decoys = images[::2].clone()
    if variant.blend:
        some = round(variant.blend * len(decoys))
        both = decoys[:some].float() + decoys.flip(0)[:some].float()
        images[: 2 * some : 2] = (both / 2).to(torch.uint8)
    if variant.varied:
        images[::2] = varied(decoys, variant)
    if variant.turned:
        decoys = images[::2].clone()
        turned = torch.rand(len(decoys)) < variant.turned
        quarters = int(torch.randint(1, 4, ()))
        decoys[turned] = decoys[turned].rot90(quarters, (1, 2))
        images[::2] = decoys
    if variant.own:
        images[::2] = owned(images[::2], images[1::2], variant)
    if variant.erased:
        for number in (torch.rand(len(images)) < variant.erased).nonzero().flatten():
            height, width = torch.randint(8, 33, (2,)).tolist()
            top, left = (int(torch.randint(65 - side, ())) for side in (height, width))
            box = images[number, top : top + height, left : left + width]
            box[:] = torch.randint(256, (3,))
    return images


def mixed(
    images: torch.Tensor, labels: torch.Tensor, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch and its labels, each blended with another of it."""
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    order = torch.randperm(len(images))
    blend = images.float().lerp(images[order].float(), 1 - share)
    return blend.round().to(torch.uint8), labels.lerp(labels[order], 1 - share)


def owned(decoys: torch.Tensor, catalog: torch.Tensor, variant: Variant) -> torch.Tensor:
    """Decoys, some of them catalog pictures changed until they are others."""
    dice = torch.rand(4, len(decoys))
    made = catalog.clone()
    swapped = dice[1] < variant.own_recoloured
    order = list(permutations(range(3)))[int(torch.randint(1, 6, ()))]
    made[swapped] = made[swapped][..., list(order)]
    mirrored = dice[2] < variant.own_mirrored
    made[mirrored] = made[mirrored].flip(2)
    upside = dice[3] < variant.own_upside
    made[upside] = made[upside].flip(1)
    other = (made.float() - catalog.float()).abs().mean((1, 2, 3)) > 12
    taken = (dice[0] < variant.own) & other
    return torch.where(taken[:, None, None, None], made, decoys)


def varied(decoys: torch.Tensor, variant: Variant) -> torch.Tensor:
    """Decoys recoloured, mirrored, bent and put together anew."""
    dice = torch.rand(4, len(decoys))
    halves = decoys.roll(1, 0)
    left = dice[0] < variant.halved
    decoys[left, :, :32] = halves[left, :, :32]
    swapped = dice[1] < 1 / 3
    decoys[swapped] = decoys[swapped][..., torch.randperm(3)]
    mirrored = dice[2] < 1 / 2
    decoys[mirrored] = decoys[mirrored].flip(2)
    bent = dice[3] < variant.gamma
    exponents = torch.empty(int(bent.sum()), 1, 1, 3).uniform_(-0.5, 0.5).exp()
    decoys[bent] = ((decoys[bent] / 255) ** exponents * 255).round().to(torch.uint8)
    return decoys


def pooled_trunk(_: str) -> nn.Module:
    """The CNN's trunk with 2 x 2 max-pooling after each convolution."""
    layers: list[nn.Module] = []
    for before, after in ((3, 4), (4, 8), (8, 16)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(16 * 8 * 8, 384, bias=False), nn.ReLU()
    )


if __name__ == "__main__":
    main()
