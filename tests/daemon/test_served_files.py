import queue
from pathlib import Path

import pytest

from pic_daemon import served_files
from pic_daemon.errors import InputError
from pic_daemon.served_files import Loaded, ServedFiles, state_of


class Served:
    """What is served from one file: its text."""

    def __init__(self, path: Path) -> None:
        self.text = path.read_text()
        self._path = path
        self._loaded: queue.SimpleQueue[Loaded] = queue.SimpleQueue()
        before = {path: state_of(path)}
        path.with_name("new").write_text("replaced while it was loaded")
        path.with_name("new").replace(path)
        put = self._loaded.put
        self.files = ServedFiles("text", [path], self._load, self._use, put, before)

    def look(self) -> bool:
        """Look, and take what that loads; whether it loaded anything."""
        self.files.look()
        if not self.files._loading:
            return False
        self.take()
        return True

    def take(self) -> None:
        """Take what is being loaded."""
        assert self.files._loading
        self._loaded.get(timeout=60).hand_over()

    def _load(self) -> str:
        text = self._path.read_text()
        if self._path.stat().st_mode & 0o777 == 0o600:  # which root may read all the same
            raise InputError("permission denied.")
        return text

    def _use(self, text: str) -> None:
        self.text = text


@pytest.fixture
def served(tmp_path: Path) -> Served:
    (tmp_path / "file").write_text("first")
    return Served(tmp_path / "file")


def test_a_file_replaced_while_it_was_first_loaded_is_loaded_again(served: Served) -> None:
    assert served.text == "first"
    assert served.look()
    assert served.text == "replaced while it was loaded"
    assert not served.look()


def test_a_file_that_could_not_be_read_is_tried_again_once_it_may_be(
    served: Served, tmp_path: Path
) -> None:
    served.look()
    secret = tmp_path / "secret"
    secret.write_text("second")
    secret.chmod(0o600)
    secret.replace(tmp_path / "file")
    assert served.look()
    assert served.text == "replaced while it was loaded"
    assert not served.look()
    (tmp_path / "file").chmod(0o644)
    assert served.look()
    assert served.text == "second"


def test_what_did_not_load_is_tried_again_and_said_once(
    served: Served,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("WARNING", "pic_daemon")
    served.look()
    short: Exception | None = InputError("too many open files.")

    def load() -> str:
        if short:
            raise short
        return "second"

    served.files._make = load
    (tmp_path / "file").write_text("second")
    assert served.look()
    assert not served.look(), "not at once"
    monkeypatch.setattr(served_files, "_RETRY_S", 0.0)
    served.files._due = 0.0
    assert served.look() and served.look()
    assert caplog.text.count("too many open files.") == 1
    served.files.load()  # somebody asks
    served.take()
    assert caplog.text.count("too many open files.") == 2
    short = MemoryError()
    served.files._due = 0.0
    assert served.look() and served.look()
    assert caplog.text.count("text: MemoryError: .") == 1
    short = None
    assert served.look()
    assert served.text == "second"
    assert not served.look()


def test_a_load_asked_for_during_another_follows_it(served: Served, tmp_path: Path) -> None:
    served.files.load()
    loaded = served._loaded.get(timeout=60)
    (tmp_path / "file").write_text("second")
    served.files.load()
    loaded.hand_over()
    assert served.text == "replaced while it was loaded"
    served.take()
    assert served.text == "second"
    assert not served.files._loading
