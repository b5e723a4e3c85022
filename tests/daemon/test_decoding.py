import platform
import resource
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pic_daemon.decoding import Decoders

PAGES_CLEARED = "[__import__('resource').getrusage(0).ru_minflt]"  # asked of the worker


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_a_worker_keeps_the_memory_of_a_picture_for_the_next(tmp_path: Path) -> None:
    path, ended = tmp_path / "noise.webp", Queue[list[Any]]()
    noise = np.random.default_rng(0).integers(0, 256, (800, 800, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    cleared = []
    with Decoders(1, 60, ended.put) as decoders:
        for _ in range(2):
            decoders.read([str(path)] * 8, 64, 1_000_000)
            assert all(reading.image for reading in ended.get(timeout=60))
            decoders.run(eval, PAGES_CLEARED)
            cleared += ended.get(timeout=60)
    one_picture = noise.nbytes / resource.getpagesize()
    assert cleared[1] - cleared[0] < one_picture
