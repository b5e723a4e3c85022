"""The whole line, small: two folders of images to a queried match log."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from conftest import DaemonProcess
from pictures import product, write_products
from small_run import options

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_from_two_folders_to_the_match_log(run_tool: Run, tmp_path: Path) -> None:
    write_products(tmp_path / "catalog", range(2))
    write_products(tmp_path / "others", range(100, 200))
    training = options(tmp_path, tmp_path / "run", **{"train-images": 800})
    trained = run_tool("pic-train", *training)
    assert trained.returncode == 0, trained.stderr
    exported = run_tool("pic-export", tmp_path / "run", "--output", tmp_path / "model.onnx")
    assert exported.returncode == 0, exported.stderr

    daemon = DaemonProcess(tmp_path, tmp_path / "model.onnx")
    try:
        daemon.start()
        for seed in (0, 1):
            product(seed).resize((150, 150)).save(
                daemon.drop / f"ours-{seed}.jpg", quality=40
            )
        for seed in range(200, 210):
            product(seed).save(daemon.drop / f"theirs-{seed}.jpg", quality=40)
        daemon.wait_for_rows(12)
        printed = run_tool("pic-matches", "--database", daemon.database, "--json").stdout
        assert daemon.stop() == 0
    finally:
        daemon.kill_if_running()
    names = [Path(json.loads(line)["path"]).name for line in printed.splitlines()]
    assert {"ours-0.jpg", "ours-1.jpg"} <= set(names)
    assert len(names) <= 4  # both of ours, and at most two strangers of ten
