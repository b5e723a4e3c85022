import os
import platform
import resource
import subprocess
import sys
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


def test_numeric_libraries_take_no_thread_for_each_core_in_a_worker() -> None:
    ended, before = Queue[list[Any]](), os.environ.get("OPENBLAS_NUM_THREADS")
    with Decoders(1, 60, ended.put) as decoders:
        decoders.run(eval, "[__import__('os').environ.get('OPENBLAS_NUM_THREADS')]")
        assert ended.get(timeout=60) == ["1"]
    assert os.environ.get("OPENBLAS_NUM_THREADS") == before, "hooks would inherit it"


def test_a_worker_that_begins_large_has_the_same_room_for_a_picture() -> None:
    """Libraries map address space by the core: 64 of them came to 12 GB."""
    script = (
        "import mmap, threading, numpy as np\n"
        "from pic_daemon import decoding\n"
        "kept = mmap.mmap(-1, 2 * decoding.MEMORY_LIMIT, mmap.MAP_PRIVATE | 0x4000)\n"
        "decoding._start_worker(threading.Semaphore(0))\n"
        "np.empty(decoding.MEMORY_LIMIT // 2, np.uint8)\n"
        "try: np.empty(decoding.MEMORY_LIMIT * 3 // 2, np.uint8)\n"
        "except MemoryError: print('refused')\n"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.stdout, result.returncode) == ("refused\n", 0), result.stderr


# As the installed commands are: an import of the service, then its main function.
PROGRAM = """
from queue import Queue
import pic_daemon.service
from pic_daemon.decoding import Decoders

if __name__ == "__main__":
    ended = Queue()
    with Decoders(8, 60, ended.put) as decoders:
        decoders.run(eval, "['pic_daemon.service' in __import__('sys').modules]")
        print(ended.get(timeout=60))
"""


def test_workers_start_without_the_program_and_end_without_a_word(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    ended = subprocess.run([sys.executable, program], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "[False]\n", "")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_workers_start_where_their_account_may_not_be(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    os.chown(tmp_path, 65534, 65534)
    (tmp_path / "open").mkdir()
    under = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
    command = [*under, sys.executable, "-c", PROGRAM]
    ended = subprocess.run(
        command, cwd=tmp_path / "open", capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "[False]\n", "")


@pytest.mark.parametrize("python", ["/bin/false", "/nonexistent/python"])
def test_processes_that_cannot_be_started_are_told_of(python: str) -> None:
    code = f"""
import multiprocessing, click
from pic_daemon.decoding import Decoders
multiprocessing.set_executable({python!r})
try:
    with Decoders(1, 10, print):
        pass
except click.ClickException as error:
    print(error.message)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "a process that reads files has ended or could not be started" in result.stdout
