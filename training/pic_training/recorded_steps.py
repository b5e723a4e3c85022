"""Training steps that a GPU runs by one launch each: a CUDA graph of the whole step.

A step of a small network is some hundred kernels of a few microseconds. Launching them
one by one takes Python longer than it takes the GPU to run them (bench/results/gpu.md).
"""

from collections.abc import Callable

import torch

_PLAIN_FIRST = 3
"""Steps before the recording: they compile, and make what the optimizer keeps."""


class RecordedSteps:
    """Runs `learn` on batches, by its recording where they are of the first one's shape.

    `learn` takes images and labels on the GPU, must not wait for the GPU, and leaves
    what it makes in tensors that stay where they are. Every step is a real one.
    """

    def __init__(self, learn: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        self._learn = learn
        # Autograd remembers the stream of a parameter's first step, and a recording must
        # not wait for another than its own.
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: tuple[torch.Tensor, torch.Tensor] | None = None
        self._plain = 0

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """One step, after all that the current stream was given so far."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._step(images, labels)
        current.wait_stream(self._stream)

    def _step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        if self._batch is None:
            self._batch = images.clone(), labels.clone()
        if images.shape != self._batch[0].shape or self._plain < _PLAIN_FIRST:
            self._plain += 1
            self._learn(images, labels)
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._learn(*self._batch)
        for held, given in zip(self._batch, (images, labels), strict=True):
            held.copy_(given)
        self._graph.replay()
