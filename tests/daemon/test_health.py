"""What a monitor, systemd and a person can see of the service."""

import json
import os
import re
import socket
import sqlite3
import subprocess
import time
import urllib.request
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from conftest import DaemonProcess, free_address, write_image

from pic_daemon.match_log import MatchLog

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_prometheus_is_told_outcomes_latency_and_model(
    daemon: DaemonProcess,
) -> None:
    address = free_address()
    daemon.start("--metrics", address)
    for status in ("match", "no-match", "failed"):  # what is not there has no rate
        assert f'pic_images_total{{status="{status}"}} 0.0' in metrics(address)
    write_image(daemon.drop / "a.png", 200)
    write_image(daemon.drop / "b.png", 20)
    (daemon.drop / "c.png").write_text("no picture")
    daemon.wait_for_rows(3)
    daemon.wait_until(lambda: "pic_latency_seconds_count 3.0" in metrics(address))
    text = metrics(address)
    for status in ("match", "no-match", "failed"):
        assert f'pic_images_total{{status="{status}"}} 1.0' in text
    assert 'provider="CPUExecutionProvider"' in text
    assert "pic_rescans_total 1.0" in text
    for still in (
        "backlog",
        "oldest_waiting_seconds",
        "overflows_total",
        "folders_offline",
    ):
        assert f"pic_{still} 0.0" in text
    assert 'pic_latency_seconds_bucket{le="+Inf"} 3.0' in text


def test_prometheus_is_told_while_the_database_takes_nothing(
    daemon: DaemonProcess,
) -> None:
    address = free_address()
    daemon.start("--metrics", address)
    other = sqlite3.connect(daemon.database, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    write_image(daemon.drop / "a.png", 200)
    name = "pic_database_waiting_seconds"
    daemon.wait_until(lambda: not re.search(rf"^{name} 0\.0$", metrics(address), re.M))
    other.execute("ROLLBACK")
    other.close()
    daemon.wait_for_rows(1)
    daemon.wait_until(lambda: f"{name} 0.0" in metrics(address))


def metrics(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
        return str(answer.read().decode())


def test_an_address_that_cannot_be_had_is_refused(
    daemon: DaemonProcess, run_tool: Run
) -> None:
    service = (
        "--watch",
        daemon.drop,
        "--model",
        daemon.model,
        "--database",
        daemon.database,
    )
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    with taken:
        for address, code in (
            ("127.0.0.1:none", 2),
            ("127.0.0.1:99999", 2),
            (f"127.0.0.1:{port}", 1),  # these may pass, and systemd is to try again
            ("192.0.2.1:9465", 1),
            ("not-yet.invalid:9465", 1),
        ):
            result = run_tool("pic-daemon", "run", *service, "--metrics", address)
            assert (result.returncode, "metrics" in result.stderr) == (code, True)
            assert "Traceback" not in result.stderr


def test_a_second_service_does_not_take_the_log_of_one_that_runs(
    daemon: DaemonProcess, run_tool: Run
) -> None:
    service = ("--watch", daemon.drop, "--model", daemon.model)
    service += ("--database", daemon.database)
    daemon.start("--webhook", "http://127.0.0.1:9/")
    write_image(daemon.drop / "a.png", 200)
    daemon.wait_for_rows(1)
    second = run_tool("pic-daemon", "run", *service)
    assert second.returncode == 1
    assert "another pic-daemon serves it" in second.stderr
    log = sqlite3.connect(daemon.database)
    assert log.execute("SELECT count(due_at) FROM deliveries").fetchone() == (1,)
    log.close()
    daemon.kill_if_running()
    daemon.start()
    assert daemon.stop() == 0


def test_status_tells_a_service_that_lives_from_one_that_does_not(
    daemon: DaemonProcess, run_tool: Run
) -> None:
    asked = "status", "--database", daemon.database
    assert run_tool("pic-daemon", *asked).returncode == 2  # nothing there yet
    daemon.start()
    write_image(daemon.drop / "a.png", 200)
    daemon.wait_for_rows(1)
    heartbeat = run_tool("pic-daemon", *asked, "--json")
    assert json.loads(heartbeat.stdout)["scanning"] is False
    healthy = run_tool("pic-daemon", *asked)
    assert (healthy.returncode, healthy.stdout) == (
        0,
        "healthy; 0 waiting; rows: 1 match\n",
    )
    daemon.stop()
    stopped = run_tool("pic-daemon", *asked)
    assert (stopped.returncode, stopped.stdout[:23]) == (1, "the service was stopped")
    daemon.start()
    daemon.wait_until(lambda: run_tool("pic-daemon", *asked).returncode == 0)
    daemon.kill_if_running()
    log = sqlite3.connect(daemon.database)
    log.execute("UPDATE heartbeat SET at = '2026-01-01T00:00:00.000Z'")
    log.commit()
    log.close()
    silent = run_tool("pic-daemon", *asked, "--json")
    assert silent.returncode == 1
    assert "the service is down or stuck" in json.loads(silent.stdout)["problem"]
    log = sqlite3.connect(daemon.database)
    log.execute("UPDATE heartbeat SET at = '2999-01-01T00:00:00.000Z'")
    log.commit()
    log.close()
    set_back = run_tool("pic-daemon", *asked)
    assert (set_back.returncode, "clock was set back" in set_back.stdout) == (1, True)


def test_status_says_how_long_a_file_has_been_waiting_for_too_long(
    run_here: Run, tmp_path: Path
) -> None:
    asked = "status", "--database", tmp_path / "log.db"
    with closing(MatchLog.open(tmp_path / "log.db")) as log:
        log.beat({"backlog": 3, "oldest_waiting_s": 899.0})
        assert run_here("pic-daemon", *asked).stdout == "healthy; 3 waiting; rows: 0\n"
        log.beat({"backlog": 3, "oldest_waiting_s": 901.0})
        overdue = run_here("pic-daemon", *asked)
    assert (overdue.returncode, overdue.stdout) == (
        1,
        "a file has been waiting for 901 s; 3 waiting; rows: 0\n",
    )


def test_a_file_from_the_future_is_classified(daemon: DaemonProcess) -> None:
    # As after the clock was set back: its age is negative and never grows old enough.
    path = write_image(daemon.drop / "future.png", 200)
    ahead = time.time() + 3600
    os.utime(path, (ahead, ahead))
    daemon.start()
    assert daemon.wait_for_rows(1)[0]["status"] == "match"
