"""The epochs: train, validate, keep checkpoints, stop and resume exactly."""

import io
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from pic_daemon.errors import InputError
from pic_daemon.second_look import second_looks
from pic_training.device_samples import DeviceSamples, Pool, fits
from pic_training.distributed import Processes, join
from pic_training.feature_samples import FeatureSamples, unaltered
from pic_training.fine_tuning import collected, features_of
from pic_training.learner import Learner
from pic_training.metric_learning import Known
from pic_training.preparation import prepare, samples_of
from pic_training.process import release_memory
from pic_training.progress import progress_bar
from pic_training.run_folder import (
    PARITY_SAMPLES,
    EpochMetrics,
    RunConfig,
    altered_otherwise,
    another_version,
    best_of,
    has_parity,
    load_checkpoint,
    load_network,
    load_validation,
    replacing,
    save_parity,
    save_validation,
    write_metrics,
)
from pic_training.samples import Batch, labels_of, saying_who_was_killed
from pic_training.sources import Sources, working_side
from pic_training.tasks import Judged

FEATURE_BATCH = 128
"""Most images put through a network at once where nothing is learned from them: a
batch of features to learn from may be far larger than one of images."""


@dataclass
class _Progress:
    """What a checkpoint holds besides network and optimizer.

    `loss_sum` and `correct` are of the epoch's first `batch` batches, in `seconds`,
    of which `waited` went by waiting for samples.
    """

    head_fitted: bool = False
    on_device: bool | None = None  # whether a GPU makes the samples; others differ
    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    correct: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0
    history: list[EpochMetrics] = field(default_factory=list)

    def next_epoch(self) -> None:
        """Start counting anew."""
        self.epoch += 1
        self.batch, self.loss_sum, self.correct = 0, 0.0, 0.0
        self.seconds = self.waited = 0.0


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves for its report.

    `val_scores` are the best epoch's logits, the greater of those with and without even
    margins (describing: greatest cosines to the catalog), float32, shape (N,), and
    `val_right` says which samples were taken for what they are; `val_labels` are 1 for
    catalog and 0 for others; `val_sources` numbers the picture behind each sample by its
    position in `sources.pictures`, and `val_is_test` says whether the sample tests or
    calibrates. `other_seconds` went before the first epoch and after the last.
    """

    history: list[EpochMetrics]
    val_scores: NDArray[np.float32]
    val_right: NDArray[np.bool_]
    val_labels: NDArray[np.float32]
    val_sources: NDArray[np.int64]
    val_is_test: NDArray[np.bool_]
    sources: Sources
    other_seconds: float


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the checkpoint is written and `--resume` goes on from it."""


def run_training(
    config: RunConfig, folder: Path, workers: int, resume: bool
) -> RunResult | None:
    """Train as `config` says, leaving everything in `folder`.

    Started by torchrun, every process runs this; all but the first return None. Raises
    InputError for bad input (then a folder that it made is gone again) and where the
    loss stops being a number or the disk is full (then the last good checkpoint stays),
    and Interrupted after Ctrl-C or SIGTERM.
    """
    processes = join(config.device)
    started = time.monotonic()
    try:
        with ExitStack() as leaving:
            sources = processes.from_first(lambda: prepare(config, folder, resume, leaving))
            torch.manual_seed(config.seed)
            prepared = time.monotonic() - started
            try:
                run = _Run(config, folder, workers, sources, processes)
                with saying_who_was_killed():
                    return run.finish(resume, prepared)
            except KeyboardInterrupt as stop:  # before the epochs heed it: in set-up
                raise Interrupted from stop
    except OSError as error:
        raise InputError(f"{folder}: {error}.") from error
    except RuntimeError as error:
        on_cpu = "can't allocate memory" in str(error)  # as PyTorch says it there
        if not on_cpu and not isinstance(error, torch.OutOfMemoryError):
            raise
        where, less = ("this machine", ", or fewer images") if on_cpu else ("the GPU", "")
        raise InputError(
            f"{where}'s memory does not hold what a step of {config.batch_size} images "
            f"needs: free some, or start again with a smaller --batch-size{less}."
        ) from error


class _Run:
    """The state of one run while it goes on."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        workers: int,
        sources: Sources,
        processes: Processes,
    ) -> None:
        self.config = config
        self.folder = folder
        self.workers = workers
        self.sources = sources
        self.processes = processes
        self.progress = _Progress()
        self.train_set = samples_of(config, sources, "train")
        items = max(labels_of(self.train_set).values())
        self.learner = Learner(config, processes, items)
        self.val_set = samples_of(config, sources, "val")
        self.on_device: DeviceSamples | FeatureSamples | None = None
        self.catalog_batches: list[Batch] = []
        self.val_batches: list[Batch] = []
        self.interrupted = False

    def finish(self, resume: bool, prepared: float) -> RunResult | None:
        last = self.folder / "last.pt"
        with self._heeding_interrupts():
            if resume and last.exists():
                self._load(last)
            started = time.monotonic()
            if self.config.keeps_features and self.progress.epoch < self.config.epochs:
                self._keep_features()
            if self.config.head_start and not self.progress.head_fitted:
                self._start_head()
            on_gpu = self.config.device == "cuda" and self.config.task == "classify"
            if on_gpu and self.progress.epoch < self.config.epochs:
                self._move_samples()
            prepared += time.monotonic() - started
            while self.progress.epoch < self.config.epochs:
                self._train_epoch()
                self._validate_epoch()
            if not self.processes.is_first:
                return None
            trained = time.monotonic()
            if self.config.task == "classify":
                self._look_again()
            other = prepared + time.monotonic() - trained
        best = load_validation(self.folder, self.val_set.count)
        return RunResult(
            self.progress.history,
            np.maximum(best["scores"], best["within"]),
            best["right"],
            best["labels"],
            self.val_set.sources_drawn(),
            self.val_set.is_test(),
            self.sources,
            other,
        )

    @torch.no_grad()
    def _look_again(self) -> None:
        """Note what the best network makes of the samples within their margins."""
        _, network = load_network(self.folder)
        network = network.to(self.learner.device).to(memory_format=torch.channels_last)
        best = load_validation(self.folder, self.val_set.count)
        within, done = best["scores"].copy(), 0
        batches = self._val_batches()
        with self._showing("second look", batches, len(within)) as shown:
            for images, some in shown:
                if looks := second_looks(images.cpu().numpy()):
                    seen = torch.from_numpy(np.stack(list(looks.values())))
                    made = network(seen.to(self.learner.device)).float().cpu().numpy()
                    within[[done + number for number in looks]] = made
                done += len(some)
        save_validation(self.folder, **{**best, "within": within})

    def _start_head(self) -> None:
        samples = replace(self.train_set, count=self.config.head_start)
        # An epoch of its own, so that the head is not fitted to samples seen later.
        batches = samples.load(self.config.epochs, self.config.batch_size, self.workers)
        bf16 = self.config.precision == "bf16"
        features, labels = self._features("features", batches, samples.count, bf16)
        loss = self.learner.task.start_head(self.learner.network, features, labels)
        self.progress.head_fitted = True
        fit = "" if loss is None else f": loss {loss:.4f}"
        self._say(f"head fitted on {samples.count:,} samples{fit}")

    def _keep_features(self) -> None:
        """Compute once what the frozen trunk makes of every sample, and train on that."""
        train, bf16 = self.train_set, self.config.precision == "bf16"
        batches = train.load(0, FEATURE_BATCH, self.workers)
        features = self._features("training features", batches, train.count, bf16)
        # What measures is seen as the exported network will see it.
        batches, count = self._val_batches(), self.val_set.count
        self.val_batches = [self._features("validation features", batches, count)]
        batches, count = self._catalog_batches(), len(self.sources.of("catalog", "val"))
        self.catalog_batches = [self._features("catalog features", batches, count)]
        self.on_device = FeatureSamples(train, *features)
        if not self.progress.head_fitted:
            self.learner.task.start_head(self.learner.network, *features)
            self.progress.head_fitted = True

    def _features(
        self, name: str, batches: Iterator[Batch], count: int, bf16: bool = False
    ) -> Batch:
        network, device = self.learner.network, self.learner.device
        with self._showing(name, batches, count) as shown:
            return features_of(network, shown, count, device, bf16)

    def _move_samples(self) -> None:
        side = working_side(self.train_set.size)
        free, _ = torch.cuda.mem_get_info()
        progress = self.progress
        # A run that goes on holds something else there already.
        room = free * 9 // 10 if progress.on_device else free // 2
        fit = fits(self.train_set, side, room)
        fit = not self.processes.any(not fit, self.learner.device)
        if progress.on_device is None:
            progress.on_device = fit
        if not progress.on_device:
            self._say("too many pictures for the device: the CPU makes the samples")
            return
        if not fit:
            raise InputError(
                f"{self.folder} was begun with its pictures on the GPU, where there is no "
                "room for them now: free its memory."
            )
        self.on_device = DeviceSamples(
            self.train_set, Pool(self.train_set, side, self.learner.device)
        )

    def _train_epoch(self) -> None:
        progress, size = self.progress, self.config.batch_size
        begun, waited = time.monotonic() - progress.seconds, progress.waited
        self.learner.network.train()
        of, batches = self.train_set.count, self.train_set.batches(size)
        # Asking a GPU for news makes it wait.
        news_every = 64 if self.learner.recorded else 16
        if self.config.device == "cpu":
            news_every = 1
        waits = True
        with self._bar("train", of, progress.batch * size) as show:
            loader = self._train_batches()
            while True:
                asked = time.monotonic()
                batch = next(loader, None)
                if waits:
                    waited += time.monotonic() - asked
                # A GPU makes its own beside the steps.
                waits = not isinstance(self.on_device, DeviceSamples)
                if batch is None:
                    break
                whole = min(size, of - progress.batch * size)
                done = progress.epoch * batches + progress.batch
                self.learner.step(batch, whole, done / (self.config.epochs * batches))
                progress.batch += 1
                show(whole)
                if progress.batch % news_every == 0 and self._should_stop():
                    self._count(begun, waited)
                    self._save("last.pt")
                    raise Interrupted
        self._count(begun, waited)
        self._check_loss(progress.loss_sum)

    def _train_batches(self) -> Iterator[Batch]:
        progress, size = self.progress, self.config.batch_size
        if self.on_device:
            return self.on_device.load(progress.epoch, size, progress.batch, self.processes)
        return self.train_set.load(
            progress.epoch, size, self.workers, progress.batch, self.processes
        )

    def _should_stop(self) -> bool:
        self._check_loss(float(self.learner.loss_sum))
        return self.processes.any(self.interrupted, self.learner.device)

    def _check_loss(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise InputError(
                f"the loss is no longer a number at lr {self.config.lr}; "
                "start again with a smaller --lr."
            )

    def _count(self, begun: float, waited: float) -> None:
        loss, correct = self.learner.take_totals()
        self.progress.loss_sum += loss
        self.progress.correct += correct
        self.progress.seconds = time.monotonic() - begun
        self.progress.waited = waited

    def _validate_epoch(self) -> None:
        """Score the validation samples and keep the checkpoint; the first process alone."""
        interrupted = False
        if self.processes.is_first:
            try:
                self._validate_and_save()
            except Interrupted:
                interrupted = True
        else:
            self.progress.next_epoch()
        # The others wait here, and stop where the first was interrupted.
        if self.processes.any(interrupted, self.learner.device):
            raise Interrupted

    def _validate_and_save(self) -> None:
        progress = self.progress
        started = time.monotonic()
        judged, labels = self._judge_validation()
        self._check_loss(judged.loss + judged.calibrated_loss)
        metrics = EpochMetrics(
            epoch=progress.epoch + 1,
            train_loss=progress.loss_sum / self.train_set.count,
            train_accuracy=progress.correct / self.train_set.count,
            val_loss=judged.loss,
            val_accuracy=judged.accuracy,
            val_calibrated_loss=judged.calibrated_loss,
            seconds=progress.seconds,
            network_share=1 - progress.waited / max(progress.seconds, 1e-9),
            images_per_second=self.train_set.count / max(progress.seconds, 1e-9),
            val_seconds=time.monotonic() - started,
        )
        progress.history.append(metrics)
        progress.next_epoch()
        if best_of(progress.history) is metrics:
            save_validation(
                self.folder, scores=judged.scores, right=judged.right, labels=labels
            )
            self._save("best.pt")
        # Before the checkpoint: a run that goes on from it does not write these again.
        write_metrics(progress.history, self.folder)
        self._save("last.pt")
        release_memory()
        self._say(
            f"epoch {metrics.epoch}/{self.config.epochs}: "
            f"loss {metrics.train_loss:.4f}, accuracy {metrics.train_accuracy:.2%}; "
            f"validation loss {metrics.val_loss:.4f} "
            f"(calibrated {metrics.val_calibrated_loss:.4f}), "
            f"accuracy {metrics.val_accuracy:.2%}; "
            f"{metrics.images_per_second:.0f} images/s, "
            f"{metrics.network_share:.0%} of the time in the network"
        )

    def _judge_validation(self) -> tuple[Judged, NDArray[np.float32]]:
        task, known = self.learner.task, None
        if task.needs_catalog:
            catalog = self.sources.of("catalog", "val")
            outputs, _ = self._outputs("catalog", self._catalog_batches(), len(catalog))
            place = {p.path: n for n, p in enumerate(catalog)}
            items = [place.get(p.path, -1) for p in self.sources.pictures]
            _, groups = np.unique([p.group for p in catalog], return_inverse=True)
            known = Known(outputs, np.array(items)[self.val_set.sources_drawn()], groups)
        outputs, labels = self._outputs("validate", self._val_batches(), self.val_set.count)
        return task.judge(outputs, labels, ~self.val_set.is_test(), known), labels

    def _outputs(
        self, name: str, batches: Iterator[Batch], count: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """What the network makes of `count` samples, (N,) or (N, D), and labels, 1 or 0."""
        network = self.learner.network.eval()
        with self._showing(name, batches, count) as shown:
            outputs, labels = collected(
                shown, count, lambda images: network(images.to(self.learner.device))
            )
        return outputs.numpy(), (labels > 0).float().numpy()

    def _catalog_batches(self) -> Iterator[Batch]:
        """The catalog's pictures as they are."""
        if self.catalog_batches:
            return iter(self.catalog_batches)
        size = min(self.config.batch_size, FEATURE_BATCH)
        return unaltered(self.sources, self.val_set.size, size)

    def _val_batches(self) -> Iterator[Batch]:
        """The validation samples, which a GPU keeps from the first time on."""
        if self.val_batches:
            yield from self.val_batches
            return
        keep = self.config.device == "cuda" and self._val_fits()
        first: list[torch.Tensor] = []
        size = min(self.config.batch_size, FEATURE_BATCH)
        for images, labels in self.val_set.load(0, size, self.workers):
            if keep:
                # A copy: each batch would keep a descriptor of a worker's shared memory.
                self.val_batches.append((images.to(self.learner.device), labels.clone()))
            if len(first) * size < PARITY_SAMPLES:
                first.append(images)
            yield images, labels
        if not has_parity(self.folder):
            save_parity(self.folder, torch.cat(first).numpy())

    def _val_fits(self) -> bool:
        """Whether the validation samples fill less than a quarter of what is free."""
        free, _ = torch.cuda.mem_get_info()
        return self.val_set.count * self.val_set.size**2 * 3 < free // 4

    @contextmanager
    def _showing(
        self, name: str, batches: Iterator[Batch], count: int
    ) -> Iterator[Iterator[Batch]]:
        """The batches, shown as they go by; a checkpoint and Interrupted after Ctrl-C."""

        def passing(show: Callable[[int], None]) -> Iterator[Batch]:
            for batch in batches:
                yield batch
                show(len(batch[1]))
                if self.interrupted:
                    # What is trained is kept: resuming goes over these batches anew.
                    self._save("last.pt")
                    raise Interrupted

        with self._bar(name, count) as show:
            yield passing(show)

    def _save(self, name: str) -> None:
        if not self.processes.is_first:
            return
        state = {**self.learner.state(), "progress": asdict(self.progress)}
        buffer = io.BytesIO()  # torch would report a full disk as an internal error
        torch.save(state, buffer)
        with replacing(self.folder / name) as path:
            path.write_bytes(buffer.getbuffer())

    def _load(self, path: Path) -> None:
        state = load_checkpoint(path, self.learner.device)
        try:
            self.learner.restore(state, path)
            history = [EpochMetrics(**m) for m in state["progress"].pop("history")]
            versions = state["progress"].pop("versions", None)  # of a GPU, until 2026-11-27
            if versions == 0:  # they had no room there
                state["progress"]["on_device"] = False
            self.progress = _Progress(**state["progress"], history=history)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(another_version(path)) from error
        if versions and self.progress.epoch < self.config.epochs:
            raise InputError(altered_otherwise(path.parent))

    def _bar(
        self, name: str, count: int, done: int = 0
    ) -> AbstractContextManager[Callable[[int], None]]:
        epoch, epochs = self.progress.epoch + 1, self.config.epochs
        label = f"epoch {epoch}/{epochs} {name}" if epoch <= epochs else name
        return progress_bar(label, count, done, silent=not self.processes.is_first)

    def _say(self, text: str) -> None:
        if self.processes.is_first:
            click.echo(text)

    @contextmanager
    def _heeding_interrupts(self) -> Iterator[None]:
        def interrupt(*_: Any) -> None:
            self.interrupted = True

        heeded = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, interrupt) for number in heeded]
        try:
            yield
        finally:
            for number, handler in zip(heeded, before, strict=True):
                signal.signal(number, handler)
