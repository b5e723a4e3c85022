"""A smaller or faster copy of an exported network, and what it costs in recall."""

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16

from pic_daemon.errors import InputError
from pic_daemon.images import Pixels
from pic_daemon.model import Model, ModelInfo, load_model
from pic_daemon.promise import threshold_for
from pic_training.preparation import pictures_of, samples_of, say_left_out
from pic_training.run_folder import RunConfig, read_json
from pic_training.sources import scratch_file
from pic_training.threshold import Confusion, confusion, gate_for

_RESIDUAL = ["Conv", "Add", "Relu"]
_QUANTIZED = {"cnn": ["Gemm"], "resnet8": _RESIDUAL, "resnet50": _RESIDUAL}
# The CNN's convolutions have so few channels that int8 gains nothing there
# (bench/results/throughput.md).

_CALIBRATION_BATCH = 32


@dataclass(frozen=True)
class Cost:
    """The test half of the validation samples, decided before and after the change."""

    threshold: float
    before: Confusion
    after: Confusion

    def fall(self, name: str) -> float:
        """By how much `accuracy` or `recall` fell, in [-1, 1]."""
        values = [getattr(c, name).value or 0.0 for c in (self.before, self.after)]
        return float(values[0] - values[1])

    def __str__(self) -> str:
        """Before and after, in one line."""
        changes = ", ".join(
            f"{name.replace('_', ' ')} {getattr(self.before, name).value or 0:.2%} -> "
            f"{getattr(self.after, name).value or 0:.2%}"
            for name in ("accuracy", "recall", "false_positive_rate")
        )
        return f"{changes}; threshold {self.threshold:.6g}"

    def to_json(self) -> dict[str, Any]:
        """What the report of the export says."""
        return {"threshold": self.threshold, "before": asdict(self.before),
                "after": asdict(self.after)}  # fmt: skip


def convert(path: Path, info: ModelInfo, images: Pixels) -> None:
    """Turn the fp32 network at `path` into the precision that `info` says, in place.

    `images`, uint8 (N, H, W, 3), are real samples by which int8 ranges are chosen.
    """
    logging.getLogger().setLevel(logging.ERROR)  # both tools talk through the root logger
    if info.precision == "fp16":
        model = convert_float_to_float16(onnx.load(path), keep_io_types=True)
    else:
        quant_pre_process(path, path, skip_symbolic_shape=True)
        nodes = onnx.load(path).graph.node
        trunk = max(n for n, node in enumerate(nodes) if node.op_type == "Relu") + 1
        quantize_static(
            path,
            path,
            _Samples(images),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=_QUANTIZED[info.architecture],
            # What decides, behind the trunk, stays exact.
            nodes_to_exclude=[node.name for node in nodes[trunk:]],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        model = onnx.load(path)
    onnx.helper.set_model_props(model, info.to_metadata())
    onnx.checker.check_model(model)
    onnx.save_model(model, path)


def weigh(
    plain: Model, path: Path, folder: Path, config: RunConfig
) -> tuple[ModelInfo, Cost]:
    """Choose the threshold anew for the network at `path`; say what changed.

    The run's own validation samples are drawn again, for it and for `plain`, the same in
    fp32; calibrated on one half and tested on the other, as in its report. Raises
    InputError where its pictures are no longer those that it was trained with.
    """
    model = load_model(path, "cpu")
    with scratch_file() as copies:
        sources = pictures_of(config, folder, copies)
        if read_json(folder / "digest.json")["sources"] != sources.digest:
            say_left_out(sources)  # perhaps they are among those
            raise InputError(
                f"the pictures of {folder} changed since, or are chosen otherwise by this "
                "version: another precision needs them to measure what it costs."
            )
        samples = samples_of(config, sources, "val")
        batches = samples.load(0, _CALIBRATION_BATCH, workers=1)
        # Both anew: a later version may render them otherwise than the run's own did.
        scored = [
            (_score(plain, images.numpy()), _score(model, images.numpy()), known > 0)
            for images, known in batches
        ]
    before, after, labels = (np.concatenate(part) for part in zip(*scored, strict=True))
    test, groups = samples.is_test(), sources.groups()[samples.sources_drawn()]
    threshold = threshold_for(after[~test], labels[~test], config.target_fpr)
    limit = threshold_for(before[~test], labels[~test], config.target_fpr)
    was, now = (
        confusion(scores[test], labels[test], groups[test], at)
        for scores, at in ((before, limit), (after, threshold))
    )
    rate = now.false_positive_rate
    info = replace(
        model.info,
        threshold=threshold,
        gate_threshold=gate_for(after[~test], labels[~test], threshold),
        fpr=rate.value or 0.0,
        fpr_low=rate.low,
        fpr_high=rate.high,
    )
    return info, Cost(threshold, was, now)


def _score(model: Model, images: Pixels) -> np.ndarray[Any, np.dtype[np.float64]]:
    return model.full_score(images).astype(np.float64)


class _Samples(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, images: Pixels) -> None:
        size = _CALIBRATION_BATCH
        self._batches: Iterator[Pixels] = (
            images[start : start + size] for start in range(0, len(images), size)
        )

    def get_next(self) -> dict[str, Pixels] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch}
