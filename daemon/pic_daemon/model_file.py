"""The model file while the service runs: noticed when it changes, tried, handed over."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pic_daemon.errors import InputError
from pic_daemon.folders import stamp_of
from pic_daemon.model import Model, load_model
from pic_daemon.onnx_session import Provider

logger = logging.getLogger("pic_daemon")


@dataclass(frozen=True)
class NewModel:
    """A model that was loaded and tried beside the one that serves; None: it failed."""

    model: Model | None


class ModelFile:
    """Loads the file in a thread of its own; `send` gets a NewModel from there.

    For every `load` that begins, the owner calls `loaded` once its NewModel has come.
    """

    def __init__(
        self, path: Path, provider: Provider, send: Callable[[NewModel], None]
    ) -> None:
        self._path = path
        self._provider = provider
        self._send = send
        self._stamp = stamp_of(str(path.resolve()))
        self._loading = False
        self._again = False

    def look(self) -> None:
        """Load the file where it changed since it was last looked at."""
        if self._loading:
            return
        stamp = stamp_of(str(self._path.resolve()))
        if stamp and stamp != self._stamp:
            self._stamp = stamp
            self.load()

    def load(self) -> None:
        """Load the file; where that is under way already, once more after it."""
        self._again = self._loading
        if not self._loading:
            self._loading = True
            threading.Thread(target=self._load, name="model", daemon=True).start()

    def loaded(self) -> None:
        """Note that a load has ended."""
        self._loading = False
        if self._again:
            self.load()

    def _load(self) -> None:
        model = None
        try:
            model = load_model(self._path, self._provider)
        except InputError as error:
            logger.warning("%s The model in use goes on serving.", error.message)
        finally:
            self._send(NewModel(model))
