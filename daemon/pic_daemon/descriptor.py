"""STAND-IN until the descriptor's own module is merged."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pic_daemon.errors import InputError
from pic_daemon.images import Pixels
from pic_daemon.model import Provider, _session


@dataclass(frozen=True)
class DescriptorInfo:
    architecture: str
    input_size: int
    dimensions: int


@dataclass(frozen=True)
class Descriptor:
    path: Path
    sha256: str
    info: DescriptorInfo
    session: Any
    provider: str
    provider_reason: str

    def describe(self, images: Pixels) -> NDArray[np.float32]:
        (out,) = self.session.run(["embedding"], {"images": images})
        return np.asarray(out, dtype=np.float32)


def load_descriptor(
    path: Path, provider: Provider = "auto", threads: int = 0
) -> Descriptor:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"descriptor {path}: {error.strerror}.") from error
    session = _session(path, data, False, threads)
    meta = session.get_modelmeta().custom_metadata_map
    if meta.get("format") != "product-image-descriptor":
        raise InputError(f"{path} is no descriptor of ours.")
    info = DescriptorInfo(
        meta["architecture"], int(meta["input_size"]), int(meta["dimensions"])
    )
    return Descriptor(
        path, hashlib.sha256(data).hexdigest(), info, session, "CPUExecutionProvider", "x"
    )
