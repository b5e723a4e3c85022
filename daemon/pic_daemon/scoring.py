"""Scoring in a thread of its own: the loop feeds the decoders and records meanwhile.

onnxruntime computes without Python's lock: on two cores that is the difference between
one batch after the other and a pipeline (bench/results/throughput.md).
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from pic_daemon.model import Model, Verdict
from pic_daemon.reading import Reading


@dataclass(frozen=True)
class Scored:
    """A batch as `model` sees it: a verdict for each reading, None where it has no image.

    `seconds` is what the network took.
    """

    model: Model
    readings: Sequence[Reading]
    verdicts: Sequence[Verdict | None]
    seconds: float


class Scorer:
    """The thread; `send` gets a Scored for each batch, or the error that it ended with."""

    def __init__(self, send: Callable[[Scored | Exception], None]) -> None:
        self._send = send
        self._thread = ThreadPoolExecutor(1, "scoring")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown()

    def begin(
        self, model: Model, readings: Sequence[Reading], gate: float | None = None
    ) -> None:
        """Begin to score a batch, after those begun before; `gate` as for `Model.judge`."""
        self._thread.submit(self._score, model, readings, gate)

    def _score(self, model: Model, readings: Sequence[Reading], gate: float | None) -> None:
        begun = time.perf_counter()
        try:
            verdicts = iter(model.judge([r.image for r in readings if r.image], gate))
            each = [next(verdicts) if r.image else None for r in readings]
            self._send(Scored(model, readings, each, time.perf_counter() - begun))
        except Exception as error:  # a batch that nobody scores must not go unnoticed
            self._send(error)
