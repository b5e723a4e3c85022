import subprocess
import sys


def test_the_daemon_imports_neither_torch_nor_the_training_package() -> None:
    code = (
        "import pkgutil, sys, pic_daemon\n"
        "for module in pkgutil.iter_modules(pic_daemon.__path__):\n"
        "    __import__(f'pic_daemon.{module.name}')\n"
        "heavy = {'torch', 'torchvision', 'onnx', 'matplotlib', 'pic_training'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
