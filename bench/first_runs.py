"""What a batch size costs when it first comes, by how cuDNN's algorithms are chosen.

    python bench/first_runs.py MODEL.onnx...

The service keeps to one size for this. Prints for each model and way of
choosing the milliseconds of all first runs, of the longest after the first size's, and of
later runs, the least of five.
"""

import time
from pathlib import Path

import click
import numpy as np
import onnxruntime

WAYS: tuple[dict[str, str], ...] = (
    {},  # onnxruntime's own: EXHAUSTIVE
    {"cudnn_conv_algo_search": "HEURISTIC"},
    {"cudnn_conv_algo_search": "DEFAULT"},
    {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"},
)
SHOWN = (1, 8, 32, 128)


@click.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
def main(models: tuple[Path, ...]) -> None:
    onnxruntime.preload_dlls()
    for path in models:
        for way in WAYS:
            first, later = measure(path, way)
            rest = max(ms for size, ms in first.items() if size > 1)
            print(
                f"{path.name} {way or 'as it comes'}: first runs {sum(first.values()):.0f} "
                f"ms, longest after the first size {rest:.0f}; later "
                + ", ".join(f"{size}: {later[size]:.2f}" for size in SHOWN)
            )


def measure(path: Path, way: dict[str, str]) -> tuple[dict[int, float], dict[int, float]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # DEFAULT warns at every run
    session = onnxruntime.InferenceSession(
        path, options, providers=[("CUDAExecutionProvider", way), "CPUExecutionProvider"]
    )
    side = session.get_inputs()[0].shape[1]
    first, later = {}, {}
    for size in (*range(1, 33), 128):
        images = np.random.default_rng(size).integers(
            0, 256, (size, side, side, 3), np.uint8
        )
        taken = []
        for _ in range(6):
            begun = time.perf_counter()
            session.run(["score"], {"images": images})
            taken.append(1000 * (time.perf_counter() - begun))
        first[size], later[size] = taken[0], min(taken[1:])
    return first, later


if __name__ == "__main__":
    main()
