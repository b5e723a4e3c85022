"""The door between training and serving: one self-contained ONNX file.

The graph takes ``images``, uint8, shape (N, H, W, 3), RGB, and returns ``score``,
float32, shape (N,), the probability in [0, 1] that each image is from the
catalog. Everything else a server needs stands in the file's metadata.
"""

import ctypes
import hashlib
import json
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from pic_daemon.errors import InputError
from pic_daemon.images import DecodedImage, Pixels

FORMAT = "product-image-classifier"
FORMAT_VERSION = 1

Provider = Literal["auto", "cpu", "cuda"]
_PARSERS: dict[Any, Any] = {int: int, float: float}
_CUDA = "CUDAExecutionProvider"
_FATAL = 4  # onnxruntime's log severity: its own error lines give way to our sentence


@dataclass(frozen=True)
class ModelInfo:
    """What the file's metadata says; every field is a string key in `metadata_props`.

    `input_size` is the side H = W in pixels. `threshold` in [0, 1]: a score at or
    above it is a match; `threshold_rule` says how it was chosen, and `fpr`, with its
    95% interval `fpr_low` to `fpr_high`, is the share of unseen decoys that matched
    at it. `temperature` is the divisor of the logits inside the graph.
    `gate_threshold`: where another stage decides, a score at or above it goes on to it;
    0, all of them, in files that do not say.
    `catalog_digest` is the SHA-256 over the sorted SHA-256s of the catalog images.
    `precision` is what the network computes in.
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
    gate_threshold: float = 0.0
    precision: Literal["fp32", "fp16", "int8"] = "fp32"

    def to_metadata(self) -> dict[str, str]:
        """The key-value pairs to store in the ONNX file."""
        values = {key: str(value) for key, value in asdict(self).items()}
        return {"format": FORMAT, "format_version": str(FORMAT_VERSION), **values}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str], path: Path) -> "ModelInfo":
        """Read back what `to_metadata` wrote; raises InputError naming `path`."""
        if metadata.get("format") != FORMAT:
            raise InputError(
                f"{path} is an ONNX model, but not one of ours: "
                "its metadata names no catalog. Make one with pic-export."
            )
        version = metadata.get("format_version", "")
        if not version.isdigit():
            raise InputError(
                f"{path}: format version {version!r} is not a number; export again."
            )
        if int(version) > FORMAT_VERSION:
            raise InputError(
                f"{path} has format version {version}; this program reads up to "
                f"{FORMAT_VERSION}. Upgrade product-image-classifier."
            )
        try:
            values: dict[str, Any] = {
                field.name: _PARSERS.get(field.type, str)(metadata[field.name])
                for field in fields(cls)
                if field.name in metadata or field.default is MISSING
            }
            return cls(**values)
        except (KeyError, ValueError) as error:
            raise InputError(
                f"{path}: incomplete metadata ({error}); export again."
            ) from error


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
        (scores,) = self.session.run(["score"], {"images": images})
        return np.asarray(scores, dtype=np.float32)

    def judge(self, images: Sequence[DecodedImage]) -> list[Verdict]:
        """Score decoded images in one batch and say what each score means.

        A nearly uniform picture never matches, whatever the network says of it.
        """
        if not images:
            return []
        scores = self.score(np.stack([image.pixels for image in images])).tolist()
        return [
            Verdict("no-match", 0.0, "nearly uniform picture: nothing to recognise")
            if image.blank
            else Verdict("match" if score >= self.info.threshold else "no-match", score)
            for image, score in zip(images, scores, strict=True)
        ]

    def metadata_json(self) -> str:
        """The metadata as one JSON object."""
        return json.dumps(self.info.to_metadata(), sort_keys=True)


def load_model(path: Path, provider: Provider = "auto", threads: int = 0) -> Model:
    """Load and try a model file. `threads` = 0 lets onnxruntime use every core.

    ``auto`` takes CUDA where it loads and the CPU elsewhere; ``cuda`` insists.
    Raises InputError where the file is missing, not ONNX, not ours or too new, or
    where CUDA was insisted on and does not load.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"model {path}: {error.strerror}.") from error
    cuda_problem = None if provider == "cpu" else _cuda_problem()
    if provider == "cuda" and cuda_problem:
        raise InputError(f"the CUDA execution provider does not load: {cuda_problem}.")
    use_cuda = provider != "cpu" and cuda_problem is None
    session = _session(path, data, use_cuda, threads)
    active = session.get_providers()[0]
    if use_cuda and active != _CUDA:
        cuda_problem = "onnxruntime fell back when it opened the device"
        if provider == "cuda":
            raise InputError(f"the CUDA execution provider does not load: {cuda_problem}.")
    info = ModelInfo.from_metadata(session.get_modelmeta().custom_metadata_map, path)
    if provider == "cpu":
        reason = "as configured"
    else:
        reason = f"CUDA does not load: {cuda_problem}" if cuda_problem else "CUDA loads"
    model = Model(path, hashlib.sha256(data).hexdigest(), info, session, active, reason)
    _try_out(model)
    return model


def _session(
    path: Path, data: bytes, use_cuda: bool, threads: int
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = threads
    # Spinning threads would burn a core in a service that mostly waits.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    cpu = "CPUExecutionProvider"
    try:
        return onnxruntime.InferenceSession(
            data, options, providers=[_CUDA, cpu] if use_cuda else [cpu]
        )
    except Exception as error:  # onnxruntime's errors share no public base class
        detail = str(error).splitlines()[0]
        raise InputError(
            f"{path} is not an ONNX model this program can load: {detail}"
        ) from error


def _cuda_problem() -> str | None:
    """Why CUDA cannot be used here, or None; asked before a silent fallback."""
    if _CUDA not in onnxruntime.get_available_providers():
        return "this build of onnxruntime has no CUDA provider"
    if not Path("/dev/nvidiactl").exists() and not Path("/dev/dxg").exists():
        return "no NVIDIA device is visible (/dev/nvidiactl is missing)"
    folder = Path(onnxruntime.__file__).parent / "capi"
    onnxruntime.preload_dlls()
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"))
        ctypes.CDLL(str(folder / "libonnxruntime_providers_cuda.so"))
    except OSError as error:
        return f"{error}; install product-image-classifier[gpu]"
    return None


def _try_out(model: Model) -> None:
    size = model.info.input_size
    images = np.zeros((2, size, size, 3), dtype=np.uint8)
    try:
        scores = model.score(images)
    except Exception as error:
        raise InputError(
            f"{model.path} does not take images of {size} x {size} x 3: {error}"
        ) from error
    if scores.shape != (2,) or not np.isfinite(scores).all():
        raise InputError(f"{model.path} does not return one finite score per image.")
