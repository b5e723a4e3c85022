import os
import re
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from conftest import BIN, DaemonProcess
from shop import Shop

from pic_daemon.config import Config, load_config
from pic_daemon.folders import Folder
from pic_daemon.health import Health
from pic_daemon.scanning import scanning
from pic_daemon.systemd import STILL_STARTING, notify

SYSTEMD = Path(__file__).parents[2] / "systemd"


needs_systemd = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="systemd is not installed"
)
UNITS = {
    "pic-daemon": {"gpu": "pic-daemon-gpu.conf", "hooks": "pic-daemon-hooks.conf"},
    "pic-matches": {"network": "pic-matches-network.conf"},
}
"""Name -> what can be put beside it, name -> file."""


@needs_systemd
@pytest.mark.parametrize("name", UNITS)
def test_the_unit_exposes_little(name: str) -> None:
    unit = SYSTEMD / f"{name}.service"
    command = ["systemd-analyze", "security", "--offline=yes", "--threshold=20", str(unit)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-300:]


@needs_systemd
@pytest.mark.parametrize("name", UNITS)
def test_the_unit_and_what_adds_to_it_are_valid(name: str, tmp_path: Path) -> None:
    # verify insists that the programs exist: put a file where the unit points.
    unit = (SYSTEMD / f"{name}.service").read_text()
    program = tmp_path / name
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    copy = tmp_path / f"{name}.service"
    copy.write_text(unit.replace(f"/opt/pic/bin/{name}", str(program)))
    beside = tmp_path / f"{name}.service.d"
    beside.mkdir()
    for short, file in UNITS[name].items():
        text = (
            (SYSTEMD / file).read_text().replace("/usr/bin/nvidia-modprobe", str(program))
        )
        (beside / f"{short}.conf").write_text(text)
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True
    )
    problems = [line for line in result.stderr.splitlines() if name in line]
    assert (result.returncode, problems) == (0, [])


def environment_of(*files: str) -> dict[str, str]:
    """What `Environment=` says in these files, a later one over an earlier."""
    text = "".join((SYSTEMD / file).read_text() for file in files)
    lines = re.findall(r"^Environment=(.*)$", text, re.MULTILINE)
    return dict(word.split("=", 1) for line in lines for word in shlex.split(line))


@pytest.mark.parametrize("beside", [[], ["pic-matches-network.conf"]])
def test_the_unit_of_the_pages_starts_them_and_elsewhere_they_ask_for_the_token(
    tmp_path: Path, beside: list[str]
) -> None:
    shop = Shop(tmp_path / "shop")
    shop.copy_of(3, "tea.jpg")
    token = str(tmp_path / "token")
    Path(token).write_text("a-word-that-is-long-enough")
    Path(token).chmod(0o640)
    words = environment_of("pic-matches.service", *beside)
    unit = (SYSTEMD / "pic-matches.service").read_text()
    line = re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    assert line
    options = line[1].replace(
        "$ADDRESS", words["ADDRESS"].replace("/etc/pic-matches.token", token)
    )
    program, *rest = shlex.split(
        options.replace("${CATALOG}", str(shop.catalog))
        .replace("/var/lib/pic-daemon/matches.db", str(shop.database))
        .replace("8001", "0")
    )
    command = [str(BIN / Path(program).name), *rest]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as pages:
        try:
            assert pages.stdout
            url = pages.stdout.readline().split()[1].replace("0.0.0.0", "127.0.0.1")
            answer = httpx.get(f"{url}picture/1/catalog/small")
            assert answer.status_code == (401 if beside else 200)
        finally:
            pages.terminate()


def test_the_example_config_is_valid(tmp_path: Path) -> None:
    text = (SYSTEMD / "pic-daemon.toml").read_text().replace("/srv/drop", str(tmp_path))
    everything = text.replace("# provider", "provider").replace("# recursive", "recursive")
    for key in ("batch_size", "workers", "settle_seconds", "rescan_seconds", "max_pixels",
                "include", "exclude", "mode", "poll_seconds", "metrics", "webhook",
                "command", "hook_seconds", "hook_hours", "keep_no_match_days",
                "decode_seconds"):  # fmt: skip
        everything = everything.replace(f"# {key} =", f"{key} =")
    for field in fields(Config):
        assert field.name in ("folders", "missing") or f"{field.name} = " in text
    (tmp_path / "pic.toml").write_text(everything)
    given = load_config(tmp_path / "pic.toml", {"watch": ()})
    (tmp_path / "short.toml").write_text(text)
    default = load_config(tmp_path / "short.toml", {"watch": ()})
    assert given.batch_size == default.batch_size
    assert given.folders[0].include == default.folders[0].include
    assert given.max_pixels == default.max_pixels
    assert given.hook_hours == default.hook_hours
    assert given.hooks == ("webhook", "command") and default.hooks == ()
    assert given.folders[0].exclude == default.folders[0].exclude


def test_systemd_hears_when_the_service_is_ready_and_when_it_stops(
    daemon: DaemonProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = os.path.join(os.path.relpath(tmp_path), "n")  # socket paths are short
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address)
        sock.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "n"))
        monkeypatch.setenv("WATCHDOG_USEC", "2000000")
        daemon.start()
        while (message := sock.recv(200)) != b"READY=1":
            assert message == STILL_STARTING.encode()
        heard = {sock.recv(200) for _ in range(5)}
        assert b"WATCHDOG=1" in heard
        assert b"STATUS=0 waiting; nothing recorded yet" in heard
        daemon.stop()
        while (message := sock.recv(200)) != b"STOPPING=1":
            assert message.startswith((b"WATCHDOG", b"STATUS"))


def test_systemd_is_asked_for_more_time_while_folders_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(_: Folder, progress: Callable[[], None]) -> int:
        for _ in range(50):
            time.sleep(0.1)
            progress()
        return 1

    monkeypatch.setattr("pic_daemon.watch.watches_needed", slow)
    address = os.path.join(os.path.relpath(tmp_path), "n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address)
        sock.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "n"))
        with scanning([Folder(tmp_path)], lambda _: None) as (scanner,):
            assert scanner.online
        assert sock.recv(200) == STILL_STARTING.encode()
        assert sock.recv(200) == STILL_STARTING.encode()
    with scanning([Folder(tmp_path)], lambda _: None, stop_asked=lambda: True) as (late,):
        assert not late.looked.is_set()


def test_a_service_manager_that_does_not_listen_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    notify("READY=1")


def test_the_watchdog_is_fed_by_files_that_move_and_not_by_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = os.path.join(os.path.relpath(tmp_path), "n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address)
        sock.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "n"))
        monkeypatch.setenv("WATCHDOG_USEC", "4000000")  # to be fed every second
        now = 1000.0
        clock = SimpleNamespace(monotonic=lambda: now)
        monkeypatch.setattr("pic_daemon.health.time", clock)
        health = Health(stuck_after=60)

        def fed(busy: bool) -> bool:
            health.feed_watchdog(busy)
            try:
                return sock.recv(200) == b"WATCHDOG=1"
            except BlockingIOError:
                return False

        assert fed(busy=False)
        now += 60
        assert not fed(busy=True)  # files in hand, and none has moved since
        health.moved()
        assert fed(busy=True)
        now += 60
        assert not fed(busy=True)
        assert fed(busy=False)  # nothing to do is no standstill


def test_the_journal_can_tell_warnings_from_the_rest(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.log.touch()
    stderr = daemon.log.stat()
    monkeypatch.setenv("JOURNAL_STREAM", f"{stderr.st_dev}:{stderr.st_ino}")
    (daemon.drop / "new\nline.png").write_text("no picture")
    daemon.start()
    daemon.wait_for_rows(1)
    daemon.wait_until(lambda: "failed path" in daemon.log.read_text())
    lines = daemon.log.read_text().splitlines()
    assert all(line.startswith(("<6>", "<4>")) for line in lines)
    (failed,) = (line for line in lines if "failed path" in line)
    assert failed.startswith("<4>failed path=") and failed.endswith("reads'")
