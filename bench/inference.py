"""How fast a model file scores, by batch size: from host memory, as the service does, which
on a GPU keeps to one size; the same with IO binding, images copied into memory held on the
device, from ordinary and from page-locked memory; and with images and scores that stay
there, which is the limit.

    python bench/inference.py MODEL.onnx... --provider cuda --output inference.json

Needs nobody to watch it; one line a batch size, as JSON; `first_ms` is the first run of a
size. The batch size where the service's rate passes what the decoders deliver
(bench/throughput.py) is the largest worth having.
"""

import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median

import click
import numpy as np
import onnxruntime

from pic_daemon.model import load_model

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


@click.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--provider", type=click.Choice([*PROVIDERS]), required=True)
@click.option("--output", required=True, type=click.Path(path_type=Path))
@click.option("--largest", default=512, show_default=True)
@click.option("--seconds", default=2.0, show_default=True, help="For each figure.")
def main(
    models: tuple[Path, ...], provider: str, output: Path, largest: int, seconds: float
) -> None:
    rows = []
    for path in models:
        session, size = opened(path, provider)
        batch = 1
        while batch <= largest:
            images = np.random.default_rng(0).integers(
                0, 256, (batch, size, size, 3), np.uint8
            )
            begun = time.perf_counter()
            session.run(["score"], {"images": images})
            first = time.perf_counter() - begun
            row = {
                "model": path.name,
                "provider": session.get_providers()[0],
                "batch": batch,
                "first_ms": 1000 * first,
                "service": rate(from_host(session, images), batch, seconds),
                "bound": rate(bound(session, images, provider), batch, seconds),
                "limit": rate(on_device(session, images, provider), batch, seconds),
            }
            if provider != "cpu":
                copied = bound(session, page_locked(images), provider)
                row["pinned"] = rate(copied, batch, seconds)
            row["share"] = row["service"] / row["limit"]
            print(json.dumps(row), flush=True)
            rows.append(row)
            batch *= 4 if batch < 64 else 2
    machine = {"cpu": platform.processor(), "onnxruntime": onnxruntime.__version__}
    machine["product-image-classifier"] = version("product-image-classifier")
    output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


def opened(path: Path, provider: str) -> tuple[onnxruntime.InferenceSession, int]:
    """The service's own session; TensorRT, which the service does not offer, beside it."""
    if provider != "tensorrt":
        model = load_model(path, provider)  # type: ignore[arg-type]
        return model.session, model.info.input_size
    onnxruntime.preload_dlls()
    names = [PROVIDERS["tensorrt"], PROVIDERS["cuda"]]
    session = onnxruntime.InferenceSession(path, providers=names)
    if session.get_providers()[0] != names[0]:
        raise click.ClickException("the TensorRT provider does not load here")
    return session, session.get_inputs()[0].shape[1]


def from_host(
    session: onnxruntime.InferenceSession, images: np.ndarray
) -> Callable[[], object]:
    return lambda: session.run(["score"], {"images": images})


def on_device(
    session: onnxruntime.InferenceSession, images: np.ndarray, provider: str
) -> Callable[[], None]:
    binding, _, _ = held(session, images, provider)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run


def bound(
    session: onnxruntime.InferenceSession, images: np.ndarray, provider: str
) -> Callable[[], np.ndarray]:
    binding, taken, given = held(session, images, provider)

    def run() -> np.ndarray:
        taken.update_inplace(images)
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return given.numpy()

    return run


def page_locked(images: np.ndarray) -> np.ndarray:
    """The images in memory that a GPU copies from by itself."""
    import torch  # the one of pic-train: onnxruntime has no arrays in such memory

    locked = torch.empty(images.shape, dtype=torch.uint8, pin_memory=True).numpy()
    locked[:] = images
    return locked


def held(
    session: onnxruntime.InferenceSession, images: np.ndarray, provider: str
) -> tuple[onnxruntime.IOBinding, onnxruntime.OrtValue, onnxruntime.OrtValue]:
    """A binding of images and scores to memory on the device, and the two."""
    device = "cpu" if provider == "cpu" else "cuda"
    scores = np.empty(len(images), np.float32)
    taken, given = (
        onnxruntime.OrtValue.ortvalue_from_numpy(array, device)
        for array in (images, scores)
    )
    binding = session.io_binding()
    binding.bind_ortvalue_input("images", taken)
    binding.bind_ortvalue_output("score", given)
    return binding, taken, given


def rate(run: Callable[[], object], batch: int, seconds: float) -> float:
    """Images a second: the median over runs, after three to warm up."""
    for _ in range(3):
        run()
    times = []
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends or len(times) < 5:
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return batch / median(times)


if __name__ == "__main__":
    main()
