"""The epochs: train, validate, keep checkpoints, stop and resume exactly."""

import io
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import binary_cross_entropy_with_logits

from pic_daemon.errors import InputError
from pic_daemon.folders import text_of
from pic_training.networks import ARCHITECTURES, Normalised
from pic_training.run_folder import (
    EpochMetrics,
    RunConfig,
    abandon,
    claim_folder,
    read_json,
    replacing,
    write_json,
    write_metrics,
)
from pic_training.samples import SampleSet
from pic_training.sources import Sources, Split, gather, write_manifest
from pic_training.threshold import check_support

_LINE_EVERY_S = 60  # between progress lines where there is no terminal

PARITY_SAMPLES = 256
"""Validation samples kept in the run folder, on which the export is checked."""


@dataclass
class _Progress:
    """What a checkpoint holds besides network and optimizer."""

    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seconds: float = 0.0
    history: list[EpochMetrics] = field(default_factory=list)


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves for its report.

    `val_scores` are the best epoch's logits, float32, shape (N,); `val_labels` are
    1 for catalog and 0 for others; `val_sources` numbers the picture behind each
    sample by its position in `sources.pictures`, and `val_is_test` says whether the
    sample tests or calibrates. `prepared_seconds` went before the first epoch.
    """

    history: list[EpochMetrics]
    val_scores: NDArray[np.float32]
    val_labels: NDArray[np.float32]
    val_sources: NDArray[np.int64]
    val_is_test: NDArray[np.bool_]
    sources: Sources
    prepared_seconds: float


class Interrupted(Exception):
    """Ctrl-C: the checkpoint is written and `--resume` goes on from it."""


def run_training(config: RunConfig, folder: Path, workers: int, resume: bool) -> RunResult:
    """Train as `config` says, leaving everything in `folder`.

    Raises InputError for bad input (then a folder that it made is gone again) and
    where the loss stops being a number or the disk is full (then the last good
    checkpoint stays), and Interrupted after Ctrl-C.
    """
    is_new = claim_folder(config, folder, resume)
    architecture = ARCHITECTURES[config.arch]
    working_file = folder / "sources.rgb"
    started = time.monotonic()
    try:
        try:
            sources = gather(
                Path(config.catalog),
                Path(config.others),
                Path(config.others_val) if config.others_val else None,
                working_file,
                max(256, 2 * architecture.size),
            )
            _say_left_out(sources)
            _check_halves(config, sources)
            torch.manual_seed(config.seed)
            network = Normalised(architecture.build(config.weights), architecture)
            _identify(config, sources, folder, is_new)
        except BaseException:
            if is_new:
                abandon(folder)
            raise
        prepared = time.monotonic() - started
        try:
            return _Run(config, folder, workers, sources, network).finish(resume, prepared)
        except KeyboardInterrupt as stop:  # before the epochs heed it: seconds of set-up
            raise Interrupted from stop
    except OSError as error:
        raise InputError(f"{folder}: {error}.") from error
    finally:
        working_file.unlink(missing_ok=True)


def _identify(config: RunConfig, sources: Sources, folder: Path, is_new: bool) -> None:
    """Write down what the run is made of, or check that it is still made of that."""
    if is_new:
        write_json(folder / "config.json", asdict(config))
        write_json(folder / "digest.json", {"sources": sources.digest})
        write_manifest(sources, folder)
    elif read_json(folder / "digest.json")["sources"] != sources.digest:
        raise InputError(
            f"the images changed since {folder} was begun; start a new run folder."
        )


def _samples(config: RunConfig, sources: Sources, split: Split) -> SampleSet:
    count = config.train_images if split == "train" else config.val_images
    size = ARCHITECTURES[config.arch].size
    return SampleSet(sources, split, count, size, config.seed, config.augmentation)


def _check_halves(config: RunConfig, sources: Sources) -> None:
    """Refuse now what the report could not promise hours later."""
    samples = _samples(config, sources, "val")
    is_decoy = np.arange(samples.count) % 2 == 0
    is_test = samples.is_test()
    if not (is_decoy & is_test).any():
        raise InputError(
            "the others held back for validation are near-duplicates of one picture; the "
            "threshold needs one to be chosen on and one to be tested on: add others."
        )
    calibrating = int((is_decoy & ~is_test).sum())
    check_support(calibrating, config.target_fpr, "raise --val-images or --target-fpr")


def _say_left_out(sources: Sources) -> None:
    for item in sources.left_out:
        click.echo(text_of(f"left out {item.path}: {item.reason}"), err=True)
    counts = [
        (len(sources.of("catalog", "train")), "catalog images"),
        (len(sources.of("other", "train")), "others to train on"),
        (len(sources.of("other", "val")), "others to validate on"),
        (len(sources.left_out), "files left out"),
    ]
    click.echo(", ".join(f"{count} {name}" for count, name in counts))


class _Run:
    """The state of one run while it goes on."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        workers: int,
        sources: Sources,
        network: Normalised,
    ) -> None:
        self.config = config
        self.folder = folder
        self.workers = workers
        self.sources = sources
        self.device = torch.device(config.device)
        self.network = network.to(self.device).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            network.parameters(), config.lr, config.momentum, fused=True
        )
        self.progress = _Progress()
        self.train_set = _samples(config, sources, "train")
        self.val_set = _samples(config, sources, "val")
        self.interrupted = False

    def finish(self, resume: bool, prepared: float) -> RunResult:
        last = self.folder / "last.pt"
        if resume and last.exists():
            self._load(last)
        with self._heeding_interrupts():
            while self.progress.epoch < self.config.epochs:
                self._train_epoch()
                self._validate_epoch()
        with np.load(self.folder / "validation.npz") as best:
            return RunResult(
                self.progress.history,
                best["scores"],
                best["labels"],
                self.val_set.sources_drawn(),
                self.val_set.is_test(),
                self.sources,
                prepared,
            )

    def _train_epoch(self) -> None:
        progress, size = self.progress, self.config.batch_size
        started = time.monotonic()
        self.network.train()
        loader = self.train_set.load(progress.epoch, size, self.workers, progress.batch)
        with self._bar("train", self.train_set.count, progress.batch * size) as show:
            for images, labels in loader:
                loss, correct = self._step(images, labels)
                if not np.isfinite(loss):
                    raise InputError(
                        f"the loss is no longer a number at lr {self.config.lr}; "
                        "start again with a smaller --lr."
                    )
                progress.loss_sum += loss * len(labels)
                progress.correct += correct
                progress.batch += 1
                show(len(labels))
                if self.interrupted:
                    progress.seconds += time.monotonic() - started
                    self._save("last.pt")
                    raise Interrupted
        progress.seconds += time.monotonic() - started

    def _step(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
        images, labels = images.to(self.device), labels.to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self.optimizer.zero_grad()
        bf16 = self.config.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            logits = self.network(images).float()
        loss = binary_cross_entropy_with_logits(logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.item(), int(((logits > 0) == (labels > 0.5)).sum())

    def _learning_rate(self) -> float:
        """Falls from `lr` to zero along a half cosine (Loshchilov and Hutter 2017)."""
        batches = self.train_set.batches(self.config.batch_size)
        done = self.progress.epoch * batches + self.progress.batch
        share = done / (self.config.epochs * batches)
        return self.config.lr * (1 + math.cos(math.pi * share)) / 2

    def _validate_epoch(self) -> None:
        progress = self.progress
        started = time.monotonic()
        scores, labels = self._score_validation()
        loss = binary_cross_entropy_with_logits(
            torch.from_numpy(scores), torch.from_numpy(labels)
        ).item()
        metrics = EpochMetrics(
            epoch=progress.epoch + 1,
            train_loss=progress.loss_sum / self.train_set.count,
            train_accuracy=progress.correct / self.train_set.count,
            val_loss=loss,
            val_accuracy=float(((scores > 0) == (labels > 0.5)).mean()),
            seconds=progress.seconds,
            images_per_second=self.train_set.count / max(progress.seconds, 1e-9),
            val_seconds=time.monotonic() - started,
        )
        best = min((m.val_loss for m in progress.history), default=float("inf"))
        progress.history.append(metrics)
        progress.epoch += 1
        progress.batch, progress.loss_sum, progress.correct = 0, 0.0, 0
        progress.seconds = 0.0
        if metrics.val_loss < best or len(progress.history) == 1:
            with (
                replacing(self.folder / "validation.npz") as path,
                path.open("wb") as file,
            ):
                np.savez(file, scores=scores, labels=labels)
            self._save("best.pt")
        self._save("last.pt")
        write_metrics(progress.history, self.folder)
        click.echo(
            f"epoch {metrics.epoch}/{self.config.epochs}: "
            f"loss {metrics.train_loss:.4f}, accuracy {metrics.train_accuracy:.2%}; "
            f"validation loss {metrics.val_loss:.4f}, "
            f"accuracy {metrics.val_accuracy:.2%}; "
            f"{metrics.images_per_second:.0f} images/s"
        )

    @torch.no_grad()
    def _score_validation(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        self.network.eval()
        scores, labels, kept = [], [], 0
        parity = self.folder / "parity.npy"
        first: list[torch.Tensor] = []
        with self._bar("validate", self.val_set.count, 0) as show:
            for images, batch_labels in self.val_set.load(
                0, self.config.batch_size, self.workers
            ):
                scores.append(self.network(images.to(self.device)).float().cpu().numpy())
                labels.append(batch_labels.numpy())
                if kept < PARITY_SAMPLES:
                    first.append(images)
                    kept += len(images)
                show(len(images))
                if self.interrupted:
                    # The epoch is trained: resuming validates it anew.
                    self._save("last.pt")
                    raise Interrupted
        if not parity.exists():
            with replacing(parity) as path, path.open("wb") as file:
                np.save(file, torch.cat(first)[:PARITY_SAMPLES].numpy())
        return np.concatenate(scores), np.concatenate(labels)

    def _save(self, name: str) -> None:
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
        }
        buffer = io.BytesIO()  # torch would report a full disk as an internal error
        torch.save(state, buffer)
        with replacing(self.folder / name) as path:
            path.write_bytes(buffer.getbuffer())

    def _load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        history = [EpochMetrics(**m) for m in state["progress"].pop("history")]
        self.progress = _Progress(**state["progress"], history=history)

    @contextmanager
    def _heeding_interrupts(self) -> Iterator[None]:
        def interrupt(*_: Any) -> None:
            self.interrupted = True

        before = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def _bar(self, name: str, count: int, done: int) -> Iterator[Callable[[int], None]]:
        """A progress bar on a terminal, a line a minute elsewhere."""
        started = said = time.monotonic()
        shown = 0
        label = f"epoch {self.progress.epoch + 1}/{self.config.epochs} {name}"

        def rate() -> float:
            return shown / max(time.monotonic() - started, 1e-9)

        def speed(_: Any) -> str:
            return f"{rate():.0f} images/s"

        with click.progressbar(
            length=count,
            label=label,
            item_show_func=speed,
            hidden=not sys.stdout.isatty(),
        ) as bar:
            bar.update(done)

            def show(images: int) -> None:
                nonlocal shown, said
                shown += images
                bar.update(images)
                now = time.monotonic()
                if bar.hidden and now - said >= _LINE_EVERY_S:
                    said = now
                    left = (count - done - shown) / rate() / 60
                    click.echo(
                        f"{label}: {done + shown:,} of {count:,}, {rate():.0f} images/s, "
                        f"{left:.0f} min left"
                    )

            yield show
