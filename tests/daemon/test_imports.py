import os
import subprocess
import sys
from pathlib import Path

EVERY_MODULE = (
    "import pkgutil, sys, pic_daemon\n"
    "for module in pkgutil.walk_packages(pic_daemon.__path__, 'pic_daemon.'):\n"
    "    __import__(module.name)\n"
)


def test_the_daemon_imports_neither_torch_nor_the_training_package() -> None:
    code = (
        f"{EVERY_MODULE}"
        "heavy = {'torch', 'torchvision', 'onnx', 'matplotlib', 'pic_training'}\n"
        "print('pic_daemon.web.server' in sys.modules, sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "True []", result.stderr


def test_onnxruntime_sends_its_makers_nothing(tmp_path: Path) -> None:
    # It keeps what it has yet to send here, but in what it takes for somebody's CI.
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    for quiet in ("CI", "ORT_RUNNING_UNIT_TESTS", "ORT_DISABLE_TELEMETRY"):
        environment.pop(quiet, None)
    command = [sys.executable, "-c", EVERY_MODULE]
    subprocess.run(command, env=environment, check=True)
    assert not list(tmp_path.rglob("*onnxruntime*"))
