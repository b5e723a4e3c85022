"""The door between training and serving: one self-contained ONNX file.

The graph takes ``images``, uint8, shape (N, H, W, 3), RGB, and returns ``score``,
float32, shape (N,), the probability in [0, 1] that each image is from the
catalog. Everything else a server needs stands in the file's metadata.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from pic_daemon.errors import InputError
from pic_daemon.images import DecodedImage, Pixels
from pic_daemon.onnx_session import (
    Format,
    Provider,
    batch_for,
    from_metadata,
    open_session,
    run,
    to_metadata,
)
from pic_daemon.second_look import second_looks

FORMAT = Format("product-image-classifier", 1)
_HIGHEST = 1.001

Precision = Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True)
class ModelInfo:
    """What the file's metadata says; every field is a string key in `metadata_props`.

    `input_size` is the side H = W in pixels. `threshold` in [0, 1]: a score at or
    above it is a match; `threshold_rule` says how it was chosen, and `fpr`, with its
    95% interval `fpr_low` to `fpr_high`, is the share of unseen decoys that matched
    at it. Inside the graph the logits are divided by `temperature` and `bias` is added,
    so that a score is a probability: of a copy, where one image in two is one.
    `gate_threshold`: where another stage decides, a score at or above it goes on to it;
    0, all of them, in files that do not say. `looks_twice`: the threshold counts what is
    within a picture's even margins; not in files that do not say.
    `catalog_digest` is the SHA-256 over the sorted SHA-256s of the catalog images.
    `precision` is what the network computes in. Raises ValueError where a number cannot be
    what it says: nothing would ever match.
    """

    architecture: str
    input_size: int
    resize_filter: str
    color: str
    threshold: float
    threshold_rule: str
    target_fpr: float
    fpr: float
    fpr_low: float
    fpr_high: float
    temperature: float
    catalog_digest: str
    catalog_size: int
    training_run: str
    created_at: str
    versions: str
    bias: float = 0.0
    gate_threshold: float = 0.0
    looks_twice: bool = False
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        for name in ("threshold", "gate_threshold"):
            # A threshold that shuts out a decoy of score 1 lies a little above it.
            if not 0 <= (value := getattr(self, name)) <= _HIGHEST:
                raise ValueError(f"{name} {value} is no score")
        if not (0 < self.temperature < math.inf and math.isfinite(self.bias)):
            raise ValueError(f"temperature {self.temperature}, bias {self.bias}")

    def to_metadata(self) -> dict[str, str]:
        """The key-value pairs to store in the ONNX file."""
        return to_metadata(self, FORMAT)

    @classmethod
    def from_metadata(cls, metadata: dict[str, str], path: Path) -> "ModelInfo":
        """Read back what `to_metadata` wrote; raises InputError naming `path`."""
        return from_metadata(cls, FORMAT, metadata, path)


@dataclass(frozen=True)
class Verdict:
    """What the model says of one image; `score` in [0, 1], `reason` where not by score."""

    status: Literal["match", "no-match"]
    score: float
    reason: str | None = None


@dataclass(frozen=True)
class Model:
    """A loaded model, ready to score.

    `sha256` is the hex digest of the file; `provider` is the execution provider
    that the session really runs on, and `provider_reason` says why that one.
    """

    path: Path
    sha256: str
    info: ModelInfo
    session: onnxruntime.InferenceSession
    provider: str
    provider_reason: str

    def score(self, images: Pixels) -> NDArray[np.float32]:
        """Probability in [0, 1], shape (N,), for uint8 images of shape (N, H, W, 3)."""
        return run(self.session, "score", images, batch_for(self.provider))

    def second_score(self, images: Pixels, sure: float) -> NDArray[np.float32]:
        """As `score`, with a second look at each image that scores below `sure`.

        It is scored again within its even margins, where it has any, and counts by the
        greater score: a border is all that many networks see of a picture.
        """
        scores = self.score(images)
        unsure = np.flatnonzero(scores < sure)
        found = second_looks(images[unsure])
        if found:
            framed, within = unsure[list(found)], np.stack(list(found.values()))
            scores[framed] = np.maximum(scores[framed], self.score(within))
        return scores

    def full_score(self, images: Pixels) -> NDArray[np.float32]:
        """The scores that the threshold was chosen among."""
        return self.second_score(images, math.inf if self.info.looks_twice else 0.0)

    def judge(
        self, images: Sequence[DecodedImage], gate: float | None = None
    ) -> list[Verdict]:
        """Score decoded images in one batch and say what each score means.

        A nearly uniform picture never matches, whatever the network says of it, nor does
        one of which it says no number. One that scores below `gate`, where there is one,
        and else below the threshold, where the model looks twice, has a second look.
        """
        if not images:
            return []
        pixels = np.stack([image.pixels for image in images])
        own = self.info.threshold if self.info.looks_twice else 0.0
        scores = self.second_score(pixels, own if gate is None else gate).tolist()
        return [
            self._verdict(image, score) for image, score in zip(images, scores, strict=True)
        ]

    def _verdict(self, image: DecodedImage, score: float) -> Verdict:
        if image.blank:
            return Verdict("no-match", 0.0, "nearly uniform picture: nothing to recognise")
        if not math.isfinite(score):
            return Verdict("no-match", 0.0, "the model's score of it is no number")
        return Verdict("match" if score >= self.info.threshold else "no-match", score)

    def metadata_json(self) -> str:
        """The metadata as one JSON object."""
        return json.dumps(self.info.to_metadata(), sort_keys=True)


def load_model(path: Path, provider: Provider = "auto", threads: int = 0) -> Model:
    """Load and try a model file. `threads` = 0 takes every core it may run on.

    ``auto`` takes CUDA where it loads and the CPU elsewhere; ``cuda`` insists.
    Raises InputError where the file is missing, not ONNX, not ours or too new, or
    where CUDA was insisted on and does not load.
    """
    opened = open_session(path, provider, threads)
    info = ModelInfo.from_metadata(opened.metadata, path)
    model = Model(
        path,
        opened.sha256,
        info,
        opened.session,
        opened.provider,
        opened.provider_reason,
    )
    _try_out(model)
    return model


def _try_out(model: Model) -> None:
    size = model.info.input_size
    try:
        images = np.zeros((2, size, size, 3), dtype=np.uint8)
        scores = model.score(images)
    except Exception as error:
        raise InputError(
            f"{model.path} does not take images of {size} x {size} x 3: {error}"
        ) from error
    if scores.shape != (2,) or not np.isfinite(scores).all():
        raise InputError(f"{model.path} does not return one finite score per image.")
