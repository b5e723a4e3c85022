"""From a run folder to the one ONNX file that the daemon serves."""

import json
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from torch import nn

from pic_daemon.descriptor import DescriptorInfo, load_descriptor
from pic_daemon.errors import InputError
from pic_daemon.folders import text_of
from pic_daemon.images import COLOR, RESIZE_FILTER, Pixels
from pic_daemon.model import ModelInfo, Precision, load_model
from pic_training.networks import Normalised
from pic_training.precision import Cost, convert, weigh
from pic_training.run_folder import (
    RunConfig,
    load_network,
    load_parity,
    read_json,
    replacing,
    write_json,
)
from pic_training.threshold import Calibration

Floats = NDArray[np.float32]

TOLERANCE = 1e-4
"""Largest allowed difference of an output between PyTorch and onnxruntime, in fp32."""

# All samples in full batches, some one by one and in an odd number: (batch, samples).
_BATCHES = ((32, None), (1, 16), (7, 70))


@dataclass(frozen=True)
class Parity:
    """How well the exported file agrees with PyTorch on `samples` real samples.

    No decision flipped: such a file is refused.
    """

    samples: int
    max_difference: float
    verb: str


@dataclass(frozen=True)
class _Export:
    """What is written, and how its reader is asked.

    `output` names the graph's output, `read` gives the reader's function from images
    to outputs, and `above` says how far these lie above what decides. No decision may flip
    that is at least `slack` from it.
    """

    served: nn.Module
    info: ModelInfo | DescriptorInfo
    output: str
    verb: str
    read: Callable[[Path], Callable[[Pixels], Floats]]
    above: Callable[[Floats], Floats]
    slack: float


class _Served(nn.Module):
    """The calibrated network with its sigmoid: uint8 images (N, H, W, 3) -> score (N,)."""

    def __init__(self, network: Normalised, calibration: Calibration) -> None:
        super().__init__()
        self.network = network
        self.calibration = calibration

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.calibration(self.network(images)))


def export_run(
    folder: Path, output: Path, precision: Precision = "fp32", max_loss: float = 0.02
) -> tuple[Parity, Cost | None]:
    """Write the best checkpoint of a run as one ONNX file and prove it.

    The file appears under its name only after onnx's checker passed and the daemon's
    own reader saw 256 validation samples as PyTorch does. In another
    precision than fp32 the threshold is then chosen anew, and recall and accuracy on
    the test half may fall by at most `max_loss`. Raises InputError where `folder` is no
    finished run or a proof fails; then no file is left behind.
    """
    output = Path(os.path.realpath(output))  # what a link names, not the link
    _check_output(output)
    config, network = load_network(folder)
    report_file = folder / "report.json"
    if not report_file.exists():
        raise InputError(f"{folder} is not finished: resume it with pic-train --resume.")
    report = read_json(report_file)
    images = load_parity(folder, config.architecture.size)
    describes = config.task == "describe"
    if describes and precision != "fp32":
        raise InputError("a descriptor is written in fp32 only: leave --precision out.")
    make = _descriptor if describes else _classifier
    try:
        export = make(folder, config, network, report)
    except (TypeError, ValueError) as error:
        raise InputError(f"{report_file} is damaged: {error}.") from error
    cost = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output) as temporary:
            _write(export, temporary)
            parity = _prove(export, temporary, images)
            if precision != "fp32":
                assert isinstance(export.info, ModelInfo)
                info = replace(export.info, precision=precision)
                cost = _convert(temporary, info, images, folder, config, max_loss)
                write_json(folder / f"export-{precision}.json", cost.to_json())
    except OSError as error:
        where = error.filename or output
        raise InputError(f"cannot write {where}: {error.strerror or error}.") from error
    return parity, cost


def _is_network(path: Path) -> bool:
    if path.stat().st_size >= 2**31:  # protobuf knows no larger ones
        return False
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except DecodeError:
        return False
    return bool(model.graph.node)


def _check_output(output: Path) -> None:
    """Refuse to replace what is no model: a match log, an index, a device."""
    if not os.path.lexists(output):
        return
    try:
        replaceable = os.path.isfile(output) and (
            not output.stat().st_size or _is_network(output)
        )
    except OSError:
        replaceable = False
    if not replaceable:
        raise InputError(f"--output {output} is there and no ONNX file; name another.")


def _classifier(
    folder: Path, config: RunConfig, network: Normalised, report: dict[str, Any]
) -> _Export:
    info = ModelInfo(
        threshold=report["threshold"],
        threshold_rule=report["threshold_rule"],
        target_fpr=report["target_fpr"],
        fpr=report["false_positive_rate"]["value"],
        fpr_low=report["false_positive_rate"]["low"],
        fpr_high=report["false_positive_rate"]["high"],
        temperature=report["temperature"],
        bias=report.get("bias", 0.0),  # reports of earlier versions have none
        gate_threshold=report.get("gate_threshold", 0.0),
        looks_twice=report.get("looks_twice", False),
        **_common(folder, config, report),
    )
    return _Export(
        _Served(network, Calibration(info.temperature, info.bias)).eval(),
        info,
        "score",
        "score",
        lambda path: load_model(path, "cpu").score,
        lambda scores: scores - np.float32(info.threshold),
        0.0,  # it was put midway between two scores
    )


def _descriptor(
    folder: Path, config: RunConfig, network: Normalised, report: dict[str, Any]
) -> _Export:
    threshold = np.float32(report["threshold"])
    return _Export(
        network,
        DescriptorInfo(dimensions=config.dimensions, **_common(folder, config, report)),
        "embedding",
        "are described",
        lambda path: load_descriptor(path, "cpu").describe,
        lambda embeddings: embeddings @ embeddings.T - threshold,
        TOLERANCE,  # of so many pairs some lie at any threshold
    )


def _common(folder: Path, config: RunConfig, report: dict[str, Any]) -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "architecture": config.arch,
        "input_size": config.architecture.size,
        "resize_filter": RESIZE_FILTER,
        "color": COLOR,
        "catalog_digest": report["catalog_digest"],
        "catalog_size": report["catalog_size"],
        "training_run": text_of(folder.resolve().name),
        "created_at": now.replace("+00:00", "Z"),
        "versions": json.dumps(report["versions"], sort_keys=True),
    }


def _write(export: _Export, path: Path) -> None:
    size = export.info.input_size
    example = torch.zeros((2, size, size, 3), dtype=torch.uint8)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        program = torch.onnx.export(
            export.served,
            (example,),
            input_names=["images"],
            output_names=[export.output],
            dynamic_shapes={"images": {0: torch.export.Dim("N", min=1)}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, export.info.to_metadata())
    onnx.checker.check_model(model, full_check=True)
    onnx.save_model(model, path, save_as_external_data=False)


def _convert(
    path: Path,
    info: ModelInfo,
    images: Pixels,
    folder: Path,
    config: RunConfig,
    max_loss: float,
) -> Cost:
    plain = load_model(path, "cpu")
    convert(path, info, images)
    info, cost = weigh(plain, path, folder, config)
    for name in ("recall", "accuracy"):
        if cost.fall(name) > max_loss:
            raise InputError(
                f"in {info.precision} the {name} falls by {cost.fall(name):.2%}, more than "
                f"the {max_loss:.2%} allowed by --max-loss. No file was written."
            )
    model = onnx.load(path)
    onnx.helper.set_model_props(model, info.to_metadata())
    onnx.save_model(model, path)
    return cost


def _prove(export: _Export, path: Path, images: Pixels) -> Parity:
    read = export.read(path)
    with torch.no_grad():
        expected = np.concatenate(
            [
                export.served(torch.from_numpy(part)).numpy()
                for part in np.array_split(images, 8)
            ]
        )
    worst, flipped = 0.0, 0
    for batch, count in _BATCHES:
        tried, known = images[:count], expected[:count]
        parts = [tried[i : i + batch] for i in range(0, len(tried), batch)]
        outputs = np.concatenate([read(part) for part in parts])
        worst = float(np.maximum(worst, np.abs(outputs - known).max()))
        now, before = export.above(outputs), export.above(known)
        flips = ((now >= 0) != (before >= 0)) & (np.abs(before) >= export.slack)
        flipped += int(flips.sum())
    if not worst <= TOLERANCE or flipped:  # a difference that is no number is none
        raise InputError(
            f"the exported network disagrees with PyTorch: its {export.output}s differ by "
            f"up to {worst:.2e} (allowed {TOLERANCE:.0e}), {flipped} decisions flipped. "
            "No file was written."
        )
    return Parity(len(images), worst, export.verb)
