"""The architectures: a trunk that sees, and a linear head that decides or describes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from torchvision.models.resnet import BasicBlock, ResNet50_Weights, resnet50

from pic_daemon.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Of torchvision's published ResNet50 weights, for RGB in [0, 1].

SCALE = 24.0
"""Of a Recogniser's cosines. Learned, it came out below zero, at -23.6 and -24.6
(bench/results/published-protocol.md)."""

MARGIN = 0.2
"""By which a copy's cosine to its own picture is to exceed those to others."""


@dataclass(frozen=True)
class Architecture:
    """What is fixed by the choice of a network; `size` is the input's side in pixels.

    `trunk` builds what turns normalised images into `features` numbers each;
    `stages` names the parts of it that fine-tuning may freeze, first to last. `mean`
    and `std` normalise RGB in [0, 1]; `lr`, `momentum`, `batch_size` and `weight_decay`
    are the defaults for the optimizer. Of the rate there are others where the trunk has
    learned before, and where the head was fitted to it as well: a higher one undoes what
    they know (bench/results/published-protocol.md), `learned_lr` and `fitted_lr`.
    Where pictures of the catalog are named, with `prototypes` it is the head that does so.
    """

    trunk: Callable[[str], nn.Module]
    features: int
    stages: tuple[tuple[str, ...], ...]
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    lr: float
    momentum: float
    batch_size: int
    learned_lr: float | None = None
    fitted_lr: float | None = None
    weight_decay: float = 0.0
    prototypes: bool = False


class Normalised(nn.Module):
    """A trunk with its input scaling in front and a linear head behind it."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, architecture: Architecture, weights: str = "none", outputs: int = 1
    ) -> None:
        super().__init__()
        self.trunk = architecture.trunk(weights)
        self.head = nn.Linear(architecture.features, outputs)
        self._still: list[nn.Module] = []
        self.register_buffer("mean", _per_channel(architecture.mean), False)
        self.register_buffer("std", _per_channel(architecture.std), False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (N, H, W, 3) -> logits (N,): above zero where the catalog is likelier."""
        logits: torch.Tensor = self.head(self.features(images))
        return logits.squeeze(1)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (N, H, W, 3) -> what the head sees, float, shape (N, F)."""
        pixels = images.permute(0, 3, 1, 2).to(torch.float32)
        features: torch.Tensor = self.trunk((pixels - self.mean) / self.std)
        return features

    def freeze(self, stages: Iterable[tuple[str, ...]]) -> None:
        """Keep these stages of the trunk as they are, batch statistics included."""
        parts = [getattr(self.trunk, name) for stage in stages for name in stage]
        for part in parts:
            part.requires_grad_(False)
        self._still += parts

    def keep_statistics(self) -> None:
        """Normalise by the statistics that the weights came with, not by each batch's."""
        norms = [part for part in self.trunk.modules() if isinstance(part, nn.BatchNorm2d)]
        self._still += norms

    def train(self, mode: bool = True) -> "Normalised":
        """As in PyTorch, but what is frozen or keeps its statistics is left evaluating."""
        super().train(mode)
        for part in self._still:
            part.eval()
        return self


class Describer(Normalised):
    """A trunk whose features a linear head turns into a direction."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (N, H, W, 3) -> embeddings, float, shape (N, D), each of length one.

        Takes features, float (N, F), as well: those kept from a frozen trunk.
        """
        features = images if images.ndim == 2 else self.features(images)
        return self.describe(features)

    def describe(self, features: torch.Tensor) -> torch.Tensor:
        """Features (N, F) -> embeddings (N, D)."""
        if torch.is_autocast_enabled(features.device.type):
            # A whitened head takes small differences of large sums: bfloat16 loses them.
            with torch.autocast(features.device.type, enabled=False):
                return self.describe(features.float())
        embedding: torch.Tensor = self.head(normalize(features, dim=1))
        return normalize(embedding, dim=1)


class Recogniser(Normalised):
    """A trunk whose features are compared with a prototype of each of `items` pictures.

    Each picture has a logit, a multiple of the cosine to its prototype, and so has "none of
    them". What decides is the log of the odds of any to none: a decoy has to be like one
    picture, not like their kind (bench/results/ablation.md). Cosines, their scale and the
    margin in `Naming.loss` are those of Wang et al. 2018 (CosFace).
    """

    def __init__(self, architecture: Architecture, weights: str, items: int) -> None:
        super().__init__(architecture, weights)
        self.head = nn.Linear(architecture.features, items, bias=False)
        nn.init.normal_(self.head.weight)  # a step turns short ones too far
        self.none = nn.Parameter(torch.tensor(float(items)).log())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (N, H, W, 3) -> logits (N,)."""
        return self.name(self.features(images))[0]

    def name(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (N, F) -> logits (N,), and logits of each picture (N, items)."""
        with torch.autocast(features.device.type, enabled=False):
            prototypes = normalize(self.head.weight, dim=1)
            names = SCALE * normalize(features.float(), dim=1) @ prototypes.T
            return names.logsumexp(1) - self.none, names


class Naming(nn.Module):
    """A network that also says which of the catalog's `items` pictures it sees.

    It has to look for what tells a picture from its look-alikes. Only for training: what
    is kept and exported is `network`. Where that is no Recogniser, a layer beside its head
    names the pictures, and it learns by sharing its trunk.
    """

    def __init__(self, network: Normalised, items: int) -> None:
        super().__init__()
        self.network = network
        self.names: nn.Module = nn.Identity()
        if not isinstance(network, Recogniser):
            self.names = nn.Linear(network.head.in_features, items)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 (N, H, W, 3) -> logits (N,), and logits of each picture (N, items)."""
        return self.name(self.network.features(images))

    def name(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of features (N, F)."""
        if isinstance(self.network, Recogniser):
            return self.network.name(features)
        return self.network.head(features).squeeze(1), self.names(features)

    def loss(self, names: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The cross-entropy in nats of naming the catalog's samples, summed.

        `labels`, int64 (N,), count the pictures from one; decoys have zero, and no name.
        """
        own = labels - 1
        if isinstance(self.network, Recogniser):
            where = own.clamp(min=0)[:, None]  # what decoys lose is not asked for
            margins = names.new_full(where.shape, -SCALE * MARGIN)
            names = names.scatter_add(1, where, margins)
        return cross_entropy(names.float(), own, ignore_index=-1, reduction="sum")


def _per_channel(values: tuple[float, float, float]) -> torch.Tensor:
    """Of shape (3, 1, 1), or one number where the channels agree.

    onnxruntime takes 0.1 ms for 64 x 64 pixels to spread three numbers over the last
    axis, and a tenth of that for one.
    """
    same = len(set(values)) == 1
    return (
        torch.tensor(values[0] if same else values).reshape(() if same else (3, 1, 1)) * 255
    )


def cnn_trunk(weights: str = "none") -> nn.Module:
    """The published CNN but its last layer: 25,167,785 parameters with it.

    Three convolutions (kernel 3, padding 1, stride 1; 3 -> 4 -> 8 -> 16 channels)
    with ReLU and no pooling on 64 x 64 RGB, Linear(65,536 -> 384, no bias); the head
    is Linear(384 -> 1). The sigmoid follows in the loss and in the exported graph.
    """
    _refuse_weights(weights, "cnn")
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 64 * 64, 384, bias=False),
        nn.ReLU(),
    )


def resnet8_trunk(weights: str = "none") -> nn.Module:
    """A small residual network for 64 x 64 RGB: three basic blocks (He et al. 2016), each
    of half the side of what it is given, 32 -> 48 -> 96 -> 192 channels."""
    _refuse_weights(weights, "resnet8")
    layers: list[nn.Module] = [
        nn.Conv2d(3, 32, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
    ]  # fmt: skip
    for before, after in ((32, 48), (48, 96), (96, 192)):
        around = nn.Conv2d(before, after, 1, stride=2, bias=False), nn.BatchNorm2d(after)
        layers.append(BasicBlock(before, after, 2, nn.Sequential(*around)))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _refuse_weights(weights: str, arch: str) -> None:
    if weights != "none":
        raise InputError(
            f"there are no pretrained weights for the {arch}; use --arch resnet50."
        )


def resnet50_trunk(weights: str = "imagenet") -> nn.Module:
    """torchvision's ResNet50 without its last layer.

    `weights`: ``imagenet`` (torchvision fetches them), ``none``, or a file with a
    state dict in torchvision's layout, whose last layer is left aside. Raises
    InputError naming the keys or shapes that do not fit.
    """
    network = resnet50()
    if weights == "imagenet":
        _load_imagenet(network, ResNet50_Weights.IMAGENET1K_V2)
    elif weights != "none":
        _load_file(network, Path(weights))
    network.fc = nn.Identity()
    return network  # type: ignore[no-any-return]


class Levels(nn.Module):
    """A ResNet's last three stages, each averaged over the picture and of length one.

    The earlier stages keep what tells a copy from a look-alike of its kind, the last what
    survives a crop; side by side they are better than each
    (bench/results/descriptor.md).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        for name, part in network.named_children():
            if name not in ("avgpool", "fc"):
                self.add_module(name, part)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised images (N, 3, H, W) -> float (N, 512 + 1024 + 2048)."""
        levels = []
        for name, part in self.named_children():
            pixels = part(pixels)
            if name in ("layer2", "layer3", "layer4"):
                levels.append(normalize(pixels.float().mean((2, 3)), dim=1))
        return torch.cat(levels, dim=1)


def resnet50_levels(weights: str = "imagenet") -> nn.Module:
    """The trunk of `resnet50_trunk` for describing."""
    return Levels(resnet50_trunk(weights))


ARCHITECTURES = {
    "cnn": Architecture(
        cnn_trunk,
        features=384,
        stages=(),
        size=64,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        lr=0.05,
        momentum=0.0,
        batch_size=32,
    ),
    "resnet8": Architecture(
        resnet8_trunk,
        features=192,
        stages=(),
        size=64,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        lr=0.05,
        momentum=0.9,
        batch_size=64,
        weight_decay=5e-4,
        prototypes=True,
    ),
    "resnet50": Architecture(
        resnet50_trunk,
        features=2048,
        stages=(("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)),
        size=224,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        lr=0.01,
        momentum=0.9,
        batch_size=32,
        learned_lr=0.001,
        fitted_lr=0.0001,
    ),
}


DESCRIBERS = {
    "cnn": replace(ARCHITECTURES["cnn"], lr=0.001, momentum=0.9, batch_size=256),
    "resnet50": replace(
        ARCHITECTURES["resnet50"],
        trunk=resnet50_levels,
        features=3584,
        size=160,
        lr=0.0001,
        momentum=0.9,
        batch_size=128,
        learned_lr=None,
        fitted_lr=None,
    ),
}
"""The same networks with what suits describing: `lr` and `momentum` are Adam's
(bench/results/descriptor.md)."""


def _load_imagenet(network: nn.Module, weights: Any) -> None:
    try:
        network.load_state_dict(weights.get_state_dict(check_hash=True))
    except (OSError, RuntimeError, UnpicklingError) as error:  # the last two: damaged
        raise InputError(
            f"the ImageNet weights cannot be fetched ({error}); "
            "give --weights FILE with a local state dict, or --weights none."
        ) from error


def _load_file(network: nn.Module, path: Path) -> None:
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"weights {path} cannot be read: {error.strerror}.") from error
    except Exception as error:  # torch raises many kinds for a bad file
        raise InputError(
            f"weights {path} cannot be read as a state dict ({type(error).__name__}); "
            "give a file that torch.save made of tensors alone."
        ) from error
    if isinstance(stored, dict) and isinstance(stored.get("state_dict"), dict):
        stored = stored["state_dict"]
    if not isinstance(stored, dict) or not all(isinstance(k, str) for k in stored):
        raise InputError(f"weights {path} hold no state dict.")
    wanted = {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}
    # Wrappers such as DataParallel put a prefix before every key.
    first = next((k for k in stored if k.endswith("conv1.weight") and "layer" not in k), "")
    prefix = first.removesuffix("conv1.weight")
    given = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    wrong = [k for k in wanted if k not in given and not k.endswith("num_batches_tracked")]
    if wrong:
        raise InputError(
            f"weights {path} are not those of a ResNet50: {len(wrong)} keys are "
            f"missing, among them {', '.join(wrong[:3])}."
        )
    for key, value in wanted.items():
        if key not in given:
            continue
        if not isinstance(given[key], torch.Tensor) or not given[key].isfinite().all():
            raise InputError(f"weights {path}: {key} holds no numbers, or not only such.")
        if given[key].shape != value.shape:
            raise InputError(
                f"weights {path}: {key} has shape {tuple(given[key].shape)}, "
                f"not {tuple(value.shape)}."
            )
    network.load_state_dict({k: given.get(k, v) for k, v in wanted.items()}, strict=False)
