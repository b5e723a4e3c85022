"""Parts that many tests share: a small real ONNX model, and the daemon as a process."""

import os
import select
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper
from PIL import Image
from sqlite_utils import Database

from pic_daemon.model import ModelInfo

sys.path.insert(0, str(Path(__file__).parent))  # pictures.py

SLOWEST = (  # by how long they take, with the two that wait for one run apart
    "test_export", "test_device_samples", "test_training", "test_offline", "test_trouble",
    "test_describing", "test_distributed", "test_line", "test_evaluation", "test_naming",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files first: one begun last would keep a single worker busy alone."""
    ranks = {name: rank for rank, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


SIZE = 16
OPSET = helper.make_opsetid("", 18)
BIN = Path(sys.executable).parent

INFO = ModelInfo(
    architecture="brightness",
    input_size=SIZE,
    resize_filter="bilinear",
    color="sRGB",
    threshold=0.5,
    threshold_rule="set by hand",
    target_fpr=0.01,
    fpr=0.0,
    fpr_low=0.0,
    fpr_high=0.01,
    temperature=1.0,
    catalog_digest="0" * 64,
    catalog_size=1,
    training_run="none",
    created_at="2026-01-01T00:00:00Z",
    versions="{}",
)


def write_model(
    path: Path, metadata: dict[str, str] | None = None, size: int = SIZE
) -> Path:
    """A real ONNX model whose score is the picture's mean brightness, 0 to 1."""
    images = helper.make_tensor_value_info(
        "images", TensorProto.UINT8, ["N", size, size, 3]
    )
    score = helper.make_tensor_value_info("score", TensorProto.FLOAT, ["N"])
    constants = [
        helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3]),
        helper.make_tensor("white", TensorProto.FLOAT, [], [255.0]),
    ]
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float", "axes"], ["mean"], keepdims=0),
        helper.make_node("Div", ["mean", "white"], ["score"]),
    ]
    graph = helper.make_graph(nodes, "brightness", [images], [score], constants)
    model = helper.make_model(graph, opset_imports=[OPSET], ir_version=10)
    helper.set_model_props(model, INFO.to_metadata() if metadata is None else metadata)
    onnx.save_model(model, path)
    return path


def write_image(path: Path, level: int, side: int = 40) -> Path:
    """A grey picture of two stripes; the model above scores it as level / 255.

    Levels 0 and 255 are flat, which counts as blank.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stripes = np.full((side, side, 3), min(255, 2 * level), np.uint8)
    stripes[: side // 2] = max(0, 2 * level - 255)
    Image.fromarray(stripes).save(path)
    return path


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.onnx")


@pytest.fixture
def run_tool() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run one of our commands to its end."""

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / name), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture
def run_here(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """As `run_tool`, in this process: for commands that end before there is work to do.

    A process of its own would import PyTorch for each, which takes longer than all of them.
    """

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        (script,) = entry_points(group="console_scripts", name=name)
        if script.module == "pic_training.cli":
            # It sets how this process takes memory, for good.
            monkeypatch.setattr("pic_training.cli.prepare_for_training", lambda: None)
        result = CliRunner().invoke(script.load(), [*map(str, arguments)])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception  # a traceback, to a user
        return subprocess.CompletedProcess(
            name, result.exit_code, result.stdout, result.stderr
        )

    return run


def free_address() -> str:
    """An address at which nothing listens now."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


@contextmanager
def mounted(source: Path, folder: Path, *options: str) -> Iterator[None]:
    """`source` mounted at `folder`; the test is skipped where that needs root."""
    mount = ["mount", *(options or ["--bind"]), str(source), str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def swallow(device: int, done: threading.Event) -> None:
    """Serve a FUSE device: say hello (fuse.h, FUSE_INIT), and answer nothing else."""
    while not done.is_set():
        if select.select([device], [], [], 0.1)[0]:
            request = os.read(device, 1 << 20)
            _, operation, unique = struct.unpack_from("IIQ", request)
            if operation == 26:
                hello = struct.pack("IIII", 7, 31, 0, 0) + bytes(48)
                os.write(device, struct.pack("IiQ", 16 + len(hello), 0, unique) + hello)


@contextmanager
def hung_mount(folder: Path, served: bool = False) -> Iterator[None]:
    """A FUSE file system that nobody answers for: whatever looks at `folder` hangs.

    `served`: a server takes the requests, so that SIGKILL does not end who waits.
    """
    try:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK)
    except OSError:
        pytest.skip("a mount that hangs needs /dev/fuse and root")
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0"
    mount = ["mount", "-i", "-t", "fuse", "-o", options, "hung", str(folder)]
    try:
        if subprocess.run(mount, pass_fds=[device], capture_output=True).returncode:
            pytest.skip("mounting needs root")
        done = threading.Event()
        server = threading.Thread(target=swallow, args=[device, done])
        if served:
            server.start()
        try:
            yield
        finally:
            done.set()
            if served:
                server.join()
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
    finally:
        os.close(device)  # then what hung in it gets an error


class DaemonProcess:
    """pic-daemon as a real process on the folder `drop`."""

    def __init__(self, home: Path, model: Path) -> None:
        self.drop = home / "drop"
        self.drop.mkdir(exist_ok=True)
        self.database = home / "log.db"
        self.model = model
        self.log = home / "daemon.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(
        self, *options: object, watch: bool = True, under: Sequence[object] = ()
    ) -> None:
        """Start it and wait until it is ready; `under` is a command that runs it."""
        command: list[object] = [*under, BIN / "pic-daemon", "run"]
        command += ["--watch", self.drop] if watch else []
        command += ["--model", self.model, "--database", self.database]
        command += ["--settle-seconds", 0.3, *options]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen([str(part) for part in command], stderr=log)
        self.wait_until(lambda: "ready" in self.log.read_text())

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self._process
        self._process.send_signal(number)
        return self._process.wait(30)

    def wait_for_end(self) -> int:
        """Wait until it ends by itself; returns its exit code."""
        return self._process.wait(30)

    def reload(self) -> None:
        assert self._process
        self._process.send_signal(signal.SIGHUP)

    def kill_if_running(self) -> None:
        if self._process and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def rows(self) -> list[dict[str, object]]:
        database = Database(self.database)
        try:
            return list(database.query("SELECT * FROM images ORDER BY path, id"))
        finally:
            database.close()

    def in_hand(self) -> dict[str, int]:
        """File names that a decoder may be reading, with their strikes."""
        database = Database(self.database)
        try:
            rows = database.query("SELECT path, strikes FROM in_hand")
            return {Path(row["path"]).name: row["strikes"] for row in rows}
        finally:
            database.close()

    def lay(self, name: str, text: str = "no picture") -> Path:
        """A file arrives whole that nobody has written to for an hour."""
        path = self.drop.parent / f"laid-{name}"
        path.write_text(text)
        os.utime(path, (hour_ago := time.time() - 3600, hour_ago))
        return path.rename(self.drop / name)

    def wait_for_rows(self, count: int) -> list[dict[str, object]]:
        counted = "SELECT count(*) FROM images"
        with closing(sqlite3.connect(self.database)) as log:
            self.wait_until(lambda: log.execute(counted).fetchone()[0] >= count)
        return self.rows()

    def wait_until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        assert self._process
        deadline = time.monotonic() + seconds
        while not condition():
            assert self._process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)


@pytest.fixture
def daemon(tmp_path: Path, model_file: Path) -> Iterator[DaemonProcess]:
    process = DaemonProcess(tmp_path, model_file)
    yield process
    process.kill_if_running()


SEEN = 64
CELLS = 16


def write_descriptor(path: Path, sign: float = 1.0, blinded: float = 256.0) -> Path:
    """A real ONNX descriptor: the picture in 16 x 16 cells, its mean taken off.

    Another `sign` gives another file that tells pictures apart as well. Pictures brighter
    than `blinded`, on the mean, get vectors of NaN.
    """
    images = helper.make_tensor_value_info(
        "images", TensorProto.UINT8, ["N", SEEN, SEEN, 3]
    )
    embedding = helper.make_tensor_value_info(
        "embedding", TensorProto.FLOAT, ["N", 3 * CELLS**2]
    )
    constants = [
        helper.make_tensor("sign", TensorProto.FLOAT, [], [sign]),
        helper.make_tensor("blinded", TensorProto.FLOAT, [], [blinded]),
        helper.make_tensor("rows", TensorProto.INT64, [2], [0, -1]),
        helper.make_tensor("last", TensorProto.INT64, [1], [1]),
        helper.make_tensor("least", TensorProto.FLOAT, [], [1e-6]),
        # A flat picture has no direction: it gets one.
        helper.make_tensor(
            "nudge", TensorProto.FLOAT, [3 * CELLS**2], [1e-3] + [0.0] * (3 * CELLS**2 - 1)
        ),
    ]
    cell = SEEN // CELLS
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node(
            "AveragePool",
            ["planes"],
            ["cells"],
            kernel_shape=[cell] * 2,
            strides=[cell] * 2,
        ),
        helper.make_node("Reshape", ["cells", "rows"], ["flat"]),
        helper.make_node("ReduceMean", ["flat", "last"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["flat", "mean"], ["centred"]),
        helper.make_node("Sub", ["blinded", "mean"], ["below"]),
        helper.make_node("Sqrt", ["below"], ["root"]),
        helper.make_node("Mul", ["root", "root"], ["squared"]),
        helper.make_node("Div", ["squared", "squared"], ["one"]),
        helper.make_node("Add", ["centred", "nudge"], ["nudged"]),
        helper.make_node("ReduceL2", ["nudged", "last"], ["length"], keepdims=1),
        helper.make_node("Max", ["length", "least"], ["divisor"]),
        helper.make_node("Div", ["nudged", "divisor"], ["unit"]),
        helper.make_node("Mul", ["unit", "sign"], ["signed"]),
        helper.make_node("Mul", ["signed", "one"], ["embedding"]),
    ]
    graph = helper.make_graph(nodes, "cells", [images], [embedding], constants)
    model = helper.make_model(graph, opset_imports=[OPSET], ir_version=10)
    metadata = {
        "format": "product-image-descriptor",
        "format_version": "1",
        "architecture": "cells",
        "input_size": str(SEEN),
        "dimensions": str(3 * CELLS**2),
        "resize_filter": "bilinear",
        "color": "sRGB",
        "catalog_digest": "0" * 64,
        "catalog_size": "1",
        "training_run": "none",
        "created_at": "2026-01-01T00:00:00Z",
        "versions": "{}",
    }
    helper.set_model_props(model, metadata)
    onnx.save_model(model, path)
    return path


@pytest.fixture
def descriptor_file(tmp_path: Path) -> Path:
    return write_descriptor(tmp_path / "describe.onnx")
