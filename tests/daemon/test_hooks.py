"""Hooks on real matches: a real web server, real programs, the service as a process."""

import json
import os
import random
import shutil
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import DaemonProcess, free_address, hung_mount, write_image

from pic_daemon import hooks
from pic_daemon.config import Config
from pic_daemon.errors import InputError
from pic_daemon.hooks import NotDelivered, describe_hooks, post, read_header, run_command

Run = Callable[..., subprocess.CompletedProcess[str]]


class Receiver(ThreadingHTTPServer):
    """Notes what is posted; `answer` says with which status, 0 to hang up without."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []
        self.taken: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answer: Callable[[str], int] = lambda path: 204
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/matches?of=shop"

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A certificate that is refused is what some tests are about, not worth a trace.
        if not isinstance(sys.exception(), ssl.SSLError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.asked.append(self.path)
            self.server.headers.append(dict(self.headers))
            status = self.server.answer(self.path)
            if 200 <= status < 300:
                self.server.taken.append(json.loads(body))
        if status:
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "/elsewhere")
            self.end_headers()
        else:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@dataclass(frozen=True)
class SecureReceiver:
    """A receiver behind TLS; `show` has it present another certificate from now on."""

    receiver: Receiver
    context: ssl.SSLContext

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.receiver.server_port}/matches"

    def show(self, certificate: Path) -> None:
        self.context.load_cert_chain(certificate)


@pytest.fixture
def secure(receiver: Receiver) -> SecureReceiver:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    receiver.socket = context.wrap_socket(
        receiver.socket, server_side=True, do_handshake_on_connect=False
    )  # so each thread shakes hands on its own
    return SecureReceiver(receiver, context)


@pytest.fixture
def certificate(tmp_path: Path) -> Callable[..., Path]:
    """Make a key and a certificate that it signed itself, in one file."""
    if not shutil.which("openssl"):
        pytest.skip("the openssl command is not installed")

    def make(name: str, address: str = "127.0.0.1") -> Path:
        key, file = tmp_path / f"{name}.key", tmp_path / f"{name}.pem"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
             "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", f"/CN={name}",
             "-addext", f"subjectAltName=IP:{address}", "-keyout", key, "-out", file],
            check=True, capture_output=True,
        )  # fmt: skip
        file.write_text(file.read_text() + key.read_text())
        return file

    return make


def queued(daemon: DaemonProcess) -> list[tuple[str, str | None]]:
    """Hook and time due of every delivery that is still there."""
    with closing(sqlite3.connect(daemon.database)) as db:
        return db.execute("SELECT hook, due_at FROM deliveries").fetchall()


def names(messages: list[dict[str, Any]]) -> set[str]:
    return {Path(message["path"]).name for message in messages}


def test_a_webhook_that_fails_half_of_the_time_is_told_of_every_match(
    daemon: DaemonProcess, receiver: Receiver
) -> None:
    draw = random.Random(7)
    receiver.answer = lambda _: draw.choice([204, 200, 500, 0])
    daemon.start("--webhook", receiver.url)
    for number in range(24):
        write_image(daemon.drop / f"{number}.png", 150 + number)
    write_image(daemon.drop / "other.png", 20)
    daemon.wait_for_rows(25)
    daemon.wait_until(lambda: len(receiver.taken) >= 24 and not queued(daemon))
    assert names(receiver.taken) == {f"{number}.png" for number in range(24)}
    assert len(receiver.asked) > len(receiver.taken)
    assert daemon.stop() == 0
    message = next(m for m in receiver.taken if m["path"].endswith("/0.png"))
    row = next(row for row in daemon.rows() if row["path"] == message["path"])
    assert type(message.pop("delivery")) is int
    assert message == {name: row[name] for name in message}
    assert {"score", "sha256", "catalog_item", "classified_at"} <= set(message)


def test_a_program_that_fails_half_of_the_time_is_told_of_every_match(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    told, tried = tmp_path / "told.jsonl", tmp_path / "tried"
    script = tmp_path / "tell.sh"
    script.write_text(f"#!/bin/sh\necho >> {tried}\n[ $(($(wc -l < {tried}) % 2)) = 0 ] || "
                      f"exit 1\nexec cat >> {told}\n")  # fmt: skip
    script.chmod(0o755)
    daemon.start("--command", script)
    for number in range(12):
        write_image(daemon.drop / f"{number}.png", 150 + number)
    daemon.wait_for_rows(12)
    daemon.wait_until(lambda: told.exists() and not queued(daemon))
    messages = [json.loads(line) for line in told.read_text().splitlines()]
    assert names(messages) == {f"{number}.png" for number in range(12)}
    assert len(tried.read_text()) == 2 * len(messages)


def test_a_kill_between_telling_and_noting_it_tells_again(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    told = tmp_path / "told.jsonl"
    script = tmp_path / "tell.sh"
    script.write_text(f"#!/bin/sh\ncat >> {told}\n[ -e {told}.killed ] && exit 0\n"
                      f"touch {told}.killed\nkill -9 $PPID\n")  # fmt: skip
    script.chmod(0o755)
    write_image(daemon.drop / "a.png", 200)
    with suppress(AssertionError):  # it may die before anyone looks whether it is ready
        daemon.start("--command", script)
        daemon.wait_until(lambda: False)
    assert len(told.read_text().splitlines()) == 1
    daemon.start("--command", script)
    daemon.wait_until(lambda: not queued(daemon))
    first, second = map(json.loads, told.read_text().splitlines())
    assert first == second  # by its delivery number the receiver knows the repetition
    assert Path(first["path"]).name == "a.png"


def test_a_hook_that_hangs_holds_up_no_verdict_and_no_other_hook(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    told = tmp_path / "told.jsonl"
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # accepts, never answers
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/"
        daemon.start("--webhook", url, "--command", f"/usr/bin/tee -a {told}",
                     "--hook-seconds", 2)  # fmt: skip
        for number in range(30):
            write_image(daemon.drop / f"{number}.png", 200 - number)
        daemon.wait_for_rows(30)
        assert [hook for hook, _ in queued(daemon)].count("webhook") == 30
        daemon.wait_until(lambda: {hook for hook, _ in queued(daemon)} == {"webhook"})
        assert len(told.read_text().splitlines()) == 30
        assert daemon.stop() == 0
    assert "no answer within 2 s" in daemon.log.read_text()


def test_what_a_hook_never_takes_is_given_up_visibly_and_tried_again_when_asked(
    daemon: DaemonProcess, receiver: Receiver, run_tool: Run
) -> None:
    address = free_address()
    receiver.answer = lambda _: 503
    daemon.start("--webhook", receiver.url, "--hook-hours", 0, "--metrics", address)
    write_image(daemon.drop / "a.png", 200)
    daemon.wait_until(lambda: "given up after 1 attempts" in daemon.log.read_text())
    asked = "--database", daemon.database
    daemon.wait_until(lambda: queued(daemon) == [("webhook", None)])
    status = run_tool("pic-daemon", "status", *asked)
    assert (status.returncode, status.stdout) == (
        0, "healthy; 0 waiting; rows: 1 match; deliveries: 1 given up\n"
    )  # fmt: skip
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
        metrics = answer.read().decode()
    assert 'pic_deliveries{hook="webhook",state="given-up"} 1.0' in metrics
    assert 'pic_delivery_attempts_total{hook="webhook",result="failed"} 1.0' in metrics
    receiver.answer = lambda _: 200
    result = run_tool("pic-daemon", "retry", *asked, "--deliveries")
    assert result.stdout == "1 deliveries will be tried again\n"
    daemon.wait_until(lambda: not queued(daemon))
    assert names(receiver.taken) == {"a.png"}


def test_a_hook_that_was_taken_out_is_missed_in_the_log(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    daemon.start("--webhook", "http://127.0.0.1:1/")
    write_image(daemon.drop / "a.png", 200)
    daemon.wait_for_rows(1)
    daemon.stop()
    daemon.start()
    assert (
        "gave up 1 deliveries of a hook that is not set any more" in daemon.log.read_text()
    )


def test_the_header_from_the_file_is_sent_and_a_redirect_is_not_followed(
    receiver: Receiver, tmp_path: Path
) -> None:
    secret = tmp_path / "header"
    secret.write_text("Authorization: Bearer of good news\n")
    secret.chmod(0o600)
    post(receiver.url, secret, 5, '{"a": 1}')
    assert receiver.taken == [{"a": 1}]
    assert receiver.headers[0]["Authorization"] == "Bearer of good news"
    assert receiver.headers[0]["Content-Type"] == "application/json"
    receiver.answer = lambda _: 302
    with pytest.raises(NotDelivered, match=r"302 \(redirects are not followed"):
        post(receiver.url, secret, 5, "{}")
    assert receiver.asked == ["/matches?of=shop"] * 2


def test_over_https_nothing_is_told_until_the_certificate_is_trusted(
    daemon: DaemonProcess,
    secure: SecureReceiver,
    certificate: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trusted = certificate("shop")
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    secure.show(certificate("stranger"))
    daemon.start("--webhook", secure.url)
    write_image(daemon.drop / "a.png", 200)
    reason = "failed: its certificate is not accepted: self-signed certificate; it is tried"
    daemon.wait_until(lambda: daemon.log.read_text().count(reason) >= 2)
    assert [hook for hook, due in queued(daemon) if due] == ["webhook"]
    assert not secure.receiver.asked
    secure.show(trusted)
    daemon.wait_until(lambda: not queued(daemon))
    assert names(secure.receiver.taken) == {"a.png"}


def test_a_certificate_for_another_address_is_not_accepted(
    secure: SecureReceiver,
    certificate: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    elsewhere = certificate("elsewhere", "192.0.2.1")
    monkeypatch.setenv("SSL_CERT_FILE", str(elsewhere))
    secure.show(elsewhere)
    with pytest.raises(NotDelivered, match="not accepted: IP address mismatch"):
        post(secure.url, None, 5, "{}")
    (line,) = describe_hooks(Config((), elsewhere, elsewhere, webhook=secure.url))
    assert "cannot be reached now (its certificate is not accepted: IP" in line
    assert not secure.receiver.asked


def test_a_receiver_that_never_shakes_hands_is_cut_off() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        port = deaf.getsockname()[1]
        with pytest.raises(NotDelivered, match=r"no answer within 0\.5 s|timed out"):
            post(f"https://127.0.0.1:{port}/", None, 0.5, "{}")


def test_an_answer_that_never_ends_is_cut_off() -> None:
    def drip(server: socket.socket) -> None:
        with server.accept()[0] as client, suppress(OSError):
            client.sendall(b"HTTP/1.1 200 OK\r\n")
            while True:
                client.sendall(b"X: y\r\n"[:1])
                time.sleep(0.05)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=drip, args=[server], daemon=True).start()
        with pytest.raises(NotDelivered, match=r"no answer within 0\.5 s"):
            post(f"http://127.0.0.1:{server.getsockname()[1]}/", None, 0.5, "{}")


@pytest.mark.parametrize(
    ("text", "mode", "sentence"),
    [
        ("Authorization: x", 0o604, "every user may use it"),
        ("Authorization: x", 0o602, "every user may use it"),
        ("only a secret", 0o600, "one line such as"),
        ("Name: a\nOther: b", 0o600, "one line such as"),
    ],
)
def test_a_header_file_that_will_not_do_is_named(
    tmp_path: Path, text: str, mode: int, sentence: str
) -> None:
    (tmp_path / "header").write_text(text)
    (tmp_path / "header").chmod(mode)
    with pytest.raises(InputError, match=sentence):
        read_header(tmp_path / "header")


def test_a_header_file_may_be_read_by_a_group(tmp_path: Path) -> None:
    (tmp_path / "header").write_text("Authorization: x")
    (tmp_path / "header").chmod(0o640)
    assert read_header(tmp_path / "header") == ("Authorization", "x")


def test_a_program_gets_the_message_on_its_stdin(tmp_path: Path) -> None:
    run_command(["/usr/bin/tee", str(tmp_path / "told")], 10, '{"a": 1}')
    assert (tmp_path / "told").read_text() == '{"a": 1}\n'
    run_command(["/bin/true"], 10, "x" * 1_000_000)  # need not read it
    with pytest.raises(NotDelivered, match="exit code 1"):
        run_command(["/bin/false"], 10, "{}")
    with pytest.raises(NotDelivered, match="No such file"):
        run_command([str(tmp_path / "none")], 10, "{}")


def test_a_program_cannot_speak_to_systemd_for_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}
    for name in (*ours, "SHOP"):
        monkeypatch.setenv(name, "1")
    run_command(["/bin/sh", "-c", f"env > {tmp_path / 'env'}"], 10, "{}")
    given = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert "SHOP" in given and not given & ours


def test_a_program_that_takes_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    note = tmp_path / "child"
    with pytest.raises(NotDelivered, match="longer than 1 s"):
        run_command(["/bin/sh", "-c", f"sleep 600 & echo $! > {note}; wait"], 1, "{}")
    child = int(note.read_text())
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with suppress(OSError):
            if Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                continue
        break
    else:
        os.kill(child, 9)
        pytest.fail("the child lives on")


def test_a_program_that_no_signal_ends_holds_nothing_up(tmp_path: Path) -> None:
    hung = tmp_path / "hung"
    hung.mkdir()

    said: list[str] = []

    def run() -> None:
        for _ in range(2):
            try:
                run_command(["/bin/cat", str(hung / "list")], 1, "{}")
            except NotDelivered as error:
                said.append(str(error))

    with hung_mount(hung, served=True):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
    thread.join()
    assert said == [
        "it took longer than 1 s",
        "it was killed for taking too long, and has not ended yet",
    ]


def test_a_program_that_became_another_user_is_not_started_beside_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError

    command = ["/bin/sh", "-c", f"echo x >> {tmp_path / 'runs'}; exec sleep 30"]
    with monkeypatch.context() as patched:
        patched.setattr(os, "killpg", refused)
        for problem in ("took longer", "has not ended yet"):
            with pytest.raises(NotDelivered, match=problem):
                run_command(command, 1.0, "{}")
    assert (tmp_path / "runs").read_text() == "x\n"
    for process in hooks._left.values():
        process.kill()


def test_check_says_what_the_hooks_are_and_tells_them_nothing(
    run_tool: Run, run_here: Run, model_file: Path, tmp_path: Path, receiver: Receiver
) -> None:
    (tmp_path / "drop").mkdir()
    options = ["--watch", tmp_path / "drop", "--model", model_file,
               "--database", tmp_path / "l.db", "--keep-no-match-days", 30]  # fmt: skip
    good = run_tool("pic-daemon", "check", *options, "--webhook", receiver.url,
                    "--command", "/bin/true -q")  # fmt: skip
    assert good.returncode == 0, good.stderr
    assert f"webhook http://127.0.0.1:{receiver.server_port}: can be reached" in good.stdout
    assert "command /bin/true: can be run" in good.stdout
    assert "rows of no match go after 30 days" in good.stdout
    assert not receiver.asked
    down = run_here("pic-daemon", "check", *options, "--webhook", "http://127.0.0.1:1/")
    assert down.returncode == 0
    assert "cannot be reached now" in down.stdout
    for wrong, sentence in (
        (("--command", model_file), "no program that this user may run"),
        (("--webhook", receiver.url, "--webhook-header-file", tmp_path / "none"),
         "No such file"),
    ):  # fmt: skip
        for command in ("check", "run"):
            result = run_here("pic-daemon", command, *options, *wrong)
            assert result.returncode == 2
            assert sentence in result.stderr
