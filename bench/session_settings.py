"""What each setting of an onnxruntime session is worth for a model on the CPU.

    python bench/session_settings.py MODEL.onnx [--busy 1]

Each line is the service's session with one setting changed; lines take turns in an order
that is drawn anew, so that all see the same machine. `--busy` keeps so many cores at work
meanwhile, as decoders do. Prints a Markdown table: images a second, the median of rounds,
and beside the service's.
"""

import multiprocessing
import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import click
import numpy as np
import onnxruntime

from pic_daemon.cores import are_limited, cores

SPINNING = "session.{}_op.allow_spinning"
BATCHES = (1, 8, 32, 64)


def threads(count: int) -> Callable[[onnxruntime.SessionOptions], None]:
    return lambda options: setattr(options, "intra_op_num_threads", count)


def optimised(level: str) -> Callable[[onnxruntime.SessionOptions], None]:
    chosen = getattr(onnxruntime.GraphOptimizationLevel, level)
    return lambda options: setattr(options, "graph_optimization_level", chosen)


CHANGES: dict[str, Callable[[onnxruntime.SessionOptions], None]] = {
    "as the service": lambda _: None,
    "one thread": threads(1),
    "threads spin": lambda o: o.add_session_config_entry(SPINNING.format("intra"), "1"),
    "basic graph optimisation": optimised("ORT_ENABLE_BASIC"),
    "no memory pattern": lambda o: setattr(o, "enable_mem_pattern", False),
    "no memory arena": lambda o: setattr(o, "enable_cpu_mem_arena", False),
    "parallel execution": lambda o: setattr(
        o, "execution_mode", onnxruntime.ExecutionMode.ORT_PARALLEL
    ),
}


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--busy", default=0, show_default=True, help="Cores kept at work.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--seconds", default=0.5, show_default=True, help="For each figure.")
def main(model: Path, busy: int, rounds: int, seconds: float) -> None:
    sessions = {name: session(model, change) for name, change in CHANGES.items()}
    size = next(iter(sessions.values())).get_inputs()[0].shape[1]
    rates: dict[tuple[str, int], list[float]] = {}
    with ExitStack() as leaving:
        for _ in range(busy):
            worker = multiprocessing.Process(target=work, daemon=True)
            worker.start()
            leaving.callback(worker.terminate)
        for _ in range(rounds):
            for name in random.sample(sorted(sessions), len(sessions)):
                for batch in BATCHES:
                    found = rate(sessions[name], batch, size, seconds)
                    rates.setdefault((name, batch), []).append(found)
    print("| | " + " | ".join(f"batch of {batch}" for batch in BATCHES) + " |")
    print("|---|" + "---|" * len(BATCHES))
    for name in CHANGES:
        cells = []
        for batch in BATCHES:
            ours = median(rates[name, batch])
            cells.append(
                f"{ours:,.0f} ({ours / median(rates['as the service', batch]):.2f})"
            )
        print(f"| {name} | {' | '.join(cells)} |")


def session(
    model: Path, change: Callable[[onnxruntime.SessionOptions], None]
) -> onnxruntime.InferenceSession:
    """As `pic_daemon.onnx_session` opens one, but for the change."""
    options = onnxruntime.SessionOptions()
    if are_limited():
        options.intra_op_num_threads = cores()
    options.log_severity_level = 3  # it warns of a setting that is given twice
    for kind in ("intra", "inter"):  # threads that spin would slow the next line
        options.add_session_config_entry(SPINNING.format(kind), "0")
    change(options)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def rate(
    scoring: onnxruntime.InferenceSession, batch: int, size: int, seconds: float
) -> float:
    """Images a second over `seconds`, after a few runs to warm up."""
    images = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8)
    for _ in range(5):
        scoring.run(["score"], {"images": images})
    begun, runs = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        scoring.run(["score"], {"images": images})
        runs += 1
    return batch * runs / (time.perf_counter() - begun)


def work() -> None:
    """Keep a core busy with what a decoder does: numbers, bytes and their copies."""
    block = np.zeros(1 << 20, np.uint8)
    while True:
        block = np.ascontiguousarray(block[::-1])


if __name__ == "__main__":
    main()
