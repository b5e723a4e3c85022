"""The second ONNX file: what a picture looks like, as one vector.

The graph takes ``images``, uint8, shape (N, H, W, 3), RGB, and returns
``embedding``, float32, shape (N, D), each row of length one: the cosine of two
pictures is the product of their rows, and copies of one picture lie close.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from pic_daemon.errors import InputError
from pic_daemon.images import Pixels
from pic_daemon.onnx_session import (
    Format,
    Provider,
    batch_for,
    from_metadata,
    open_session,
    run,
    to_metadata,
)

FORMAT = Format("product-image-descriptor", 1)

_LENGTH_TOLERANCE = 1e-3  # fp16 rounds the last digits of a length


@dataclass(frozen=True)
class DescriptorInfo:
    """What the file's metadata says; every field is a string key in `metadata_props`.

    `input_size` is the side H = W in pixels, `dimensions` is D. `catalog_digest` is
    the SHA-256 over the sorted SHA-256s of the catalog images that it was trained on;
    a catalog may have changed since, for it describes any picture.
    """

    architecture: str
    input_size: int
    dimensions: int
    resize_filter: str
    color: str
    catalog_digest: str
    catalog_size: int
    training_run: str
    created_at: str
    versions: str

    def to_metadata(self) -> dict[str, str]:
        """The key-value pairs to store in the ONNX file."""
        return to_metadata(self, FORMAT)

    @classmethod
    def from_metadata(cls, metadata: dict[str, str], path: Path) -> "DescriptorInfo":
        """Read back what `to_metadata` wrote; raises InputError naming `path`."""
        return from_metadata(cls, FORMAT, metadata, path)


@dataclass(frozen=True)
class Descriptor:
    """A loaded descriptor, ready to describe.

    `sha256` is the hex digest of the file; `provider` is the execution provider
    that the session really runs on, and `provider_reason` says why that one.
    """

    path: Path
    sha256: str
    info: DescriptorInfo
    session: onnxruntime.InferenceSession
    provider: str
    provider_reason: str

    def describe(self, images: Pixels) -> NDArray[np.float32]:
        """Embeddings, shape (N, D), each of length one, for uint8 images (N, H, W, 3)."""
        return run(self.session, "embedding", images, batch_for(self.provider))


def load_descriptor(
    path: Path, provider: Provider = "auto", threads: int = 0
) -> Descriptor:
    """Load and try a descriptor file. `threads` = 0 takes every core it may run on.

    ``auto`` takes CUDA where it loads and the CPU elsewhere; ``cuda`` insists.
    Raises InputError where the file is missing, not ONNX, not ours or too new, where
    it does not return finite vectors of length one, or where CUDA was insisted on and
    does not load.
    """
    opened = open_session(path, provider, threads)
    info = DescriptorInfo.from_metadata(opened.metadata, path)
    descriptor = Descriptor(
        path,
        opened.sha256,
        info,
        opened.session,
        opened.provider,
        opened.provider_reason,
    )
    _try_out(descriptor)
    return descriptor


def _try_out(descriptor: Descriptor) -> None:
    size, dimensions = descriptor.info.input_size, descriptor.info.dimensions
    path = descriptor.path
    draw = np.random.default_rng(0)
    try:
        images = draw.integers(0, 256, (2, size, size, 3), dtype=np.uint8)
        embedding = descriptor.describe(images)
    except Exception as error:  # onnxruntime's errors share no public base class
        raise InputError(
            f"{path} does not take images of {size} x {size} x 3: {error}"
        ) from error
    if embedding.shape != (2, dimensions):
        raise InputError(
            f"{path} returns shape {embedding.shape} for two images, not (2, {dimensions})."
        )
    if not np.isfinite(embedding).all():
        raise InputError(f"{path} returns embeddings that are no numbers; export again.")
    lengths = np.linalg.norm(embedding, axis=1)
    if np.abs(lengths - 1).max() > _LENGTH_TOLERANCE:
        raise InputError(
            f"{path} returns embeddings of length {lengths.max():.3g}, not 1: cosines "
            "would mean nothing. Export again."
        )
