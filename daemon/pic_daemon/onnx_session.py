"""One of our ONNX files: its bytes, its metadata, and a session on a provider."""

import ctypes
import hashlib
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from pic_daemon.cores import are_limited, cores
from pic_daemon.errors import InputError
from pic_daemon.images import Pixels

Provider = Literal["auto", "cpu", "cuda"]
_PARSERS: dict[Any, Any] = {
    int: int,
    float: float,
    bool: {"True": True, "False": False}.__getitem__,
}
_CUDA = "CUDAExecutionProvider"

GPU_BATCH = 32
"""Images of each run on a GPU, where a run of another size than the one before has every
convolution prepared anew, in 0.03 to 0.3 s (github.com/microsoft/onnxruntime/issues/23006;
bench/results/gpu.md)."""
_FATAL = 4  # onnxruntime's log severity: its own error lines give way to our sentence


@dataclass(frozen=True)
class Format:
    """What a file says it is; a reader takes its own `name` up to its own `version`."""

    name: str
    version: int


@dataclass(frozen=True)
class Opened:
    """An ONNX file with a session on it; the metadata is not yet judged.

    `sha256` is the hex digest of the file; `provider` is the execution provider
    that the session really runs on, and `provider_reason` says why that one.
    """

    sha256: str
    metadata: dict[str, str]
    session: onnxruntime.InferenceSession
    provider: str
    provider_reason: str


class _Info(Protocol):
    """Any of our dataclasses of metadata."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


_I = TypeVar("_I", bound=_Info)


def open_session(path: Path, provider: Provider = "auto", threads: int = 0) -> Opened:
    """Read the file and open a session. `threads` = 0 takes every core it may run on.

    ``auto`` takes CUDA where it loads and the CPU elsewhere; ``cuda`` insists.
    Raises InputError where the file is missing or not ONNX, or where CUDA was
    insisted on and does not load.
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
    if provider == "cpu":
        reason = "as configured"
    else:
        reason = f"CUDA does not load: {cuda_problem}" if cuda_problem else "CUDA loads"
    metadata = session.get_modelmeta().custom_metadata_map
    return Opened(hashlib.sha256(data).hexdigest(), metadata, session, active, reason)


def batch_for(provider: str) -> int | None:
    """How many images a run on this execution provider takes; None: any number."""
    return GPU_BATCH if provider == _CUDA else None


def run(
    session: onnxruntime.InferenceSession, output: str, images: Pixels, batch: int | None
) -> NDArray[np.float32]:
    """The `output` of uint8 images (N, H, W, 3), float32, shape (N, ...).

    With a `batch` all runs have that size, the last one filled up with black images.
    """
    if batch is None or not len(images):
        return _run(session, output, images)
    made = []
    for begin in range(0, len(images), batch):
        part = images[begin : begin + batch]
        full = np.zeros((batch, *images.shape[1:]), np.uint8)
        full[: len(part)] = part
        made.append(_run(session, output, full)[: len(part)])
    return np.concatenate(made)


def _run(
    session: onnxruntime.InferenceSession, output: str, images: Pixels
) -> NDArray[np.float32]:
    (made,) = session.run([output], {"images": images})
    return np.asarray(made, dtype=np.float32)


def to_metadata(info: _Info, kind: Format) -> dict[str, str]:
    """The key-value pairs to store in the ONNX file: one for each field of `info`."""
    values = {key: str(value) for key, value in asdict(info).items()}
    return {"format": kind.name, "format_version": str(kind.version), **values}


def from_metadata(info: type[_I], kind: Format, metadata: dict[str, str], path: Path) -> _I:
    """Read back what `to_metadata` wrote; raises InputError naming `path`."""
    found = metadata.get("format")
    if found != kind.name:
        what = f"its metadata says {found}" if found else "its metadata says nothing of us"
        raise InputError(
            f"{path} is an ONNX model, but not one of ours for this: {what}, not "
            f"{kind.name}. Make one with pic-export."
        )
    version = metadata.get("format_version", "")
    if not version.isdigit():
        raise InputError(
            f"{path}: format version {version!r} is not a number; export again."
        )
    if int(version) > kind.version:
        raise InputError(
            f"{path} has format version {version}; this program reads up to "
            f"{kind.version}. Upgrade product-image-classifier."
        )
    try:
        values: dict[str, Any] = {
            field.name: _PARSERS.get(field.type, str)(metadata[field.name])
            for field in fields(info)
            if field.name in metadata or field.default is MISSING
        }
        return info(**values)
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: unusable metadata ({error}); export again.") from error


def _session(
    path: Path, data: bytes, use_cuda: bool, threads: int
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    # By itself it counts the machine's cores, and pins its threads to them.
    options.intra_op_num_threads = threads or (cores() if are_limited() else 0)
    # Spinning threads take the cores from the decoders (bench/results/throughput.md).
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
        return f"{error}; pip install '.[gpu]' in this project's folder"
    return None
