"""Training steps that a GPU runs by one launch each: a CUDA graph of the whole step.

A step of a small network is some hundred kernels of a few microseconds. Launching them
one by one takes Python longer than it takes the GPU to run them (bench/results/gpu.md).
"""

from collections.abc import Callable

import torch

_PLAIN_FIRST = 3
"""Steps before the recording: they compile, and make what the optimizer keeps."""


class RecordedSteps:
    """Runs `learn` on batches, by its recording where they have `size` images.

    `learn` takes images and labels on the GPU, must not wait for the GPU, and leaves
    what it makes in tensors that stay where they are. Every step is a real one.
    """

    def __init__(
        self, learn: Callable[[torch.Tensor, torch.Tensor], None], size: int
    ) -> None:
        self._learn = learn
        self._size = size
        # Autograd remembers the stream of a parameter's first step, and a recording must
        # not wait for another than its own.
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.graph: torch.cuda.CUDAGraph | None = None
        self._batch: tuple[torch.Tensor, ...] = ()
        self._plain = 0

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """One step, after all that the current stream was given so far."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._step(images, labels)
        current.wait_stream(self._stream)

    def _step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        whole = len(images) == self._size
        if not whole or self._plain < _PLAIN_FIRST:
            self._plain += whole
            self._learn(images, labels)
            return
        if self.graph is None:
            self._batch = images.clone(), labels.clone()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                self._learn(*self._batch)
            self.graph = graph
        for held, given in zip(self._batch, (images, labels), strict=True):
            held.copy_(given)
        self.graph.replay()
