"""pic-export as a user runs it, on a small scale."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from small_run import options
from torch import nn
from torch.nn.functional import normalize

from pic_daemon.errors import InputError
from pic_daemon.images import Pixels
from pic_daemon.match_log import MatchLog
from pic_daemon.model import load_model
from pic_training.export import Floats, Parity, _check_output, _descriptor, _prove
from pic_training.preparation import pictures_of, samples_of
from pic_training.run_folder import RunConfig, load_network
from pic_training.threshold import gate_for

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_the_exported_file_scores_as_the_network_and_says_what_it_is(
    finished: Path, exported: Path
) -> None:
    assert [path.name for path in exported.parent.iterdir()] == ["model.onnx"]  # one file
    model = load_model(exported, "cpu")
    report = json.loads((finished / "report.json").read_text())
    assert model.info.threshold == report["threshold"]
    assert model.info.catalog_digest == report["catalog_digest"]
    assert (model.info.catalog_size, model.info.input_size) == (6, 64)
    with np.load(finished / "validation.npz") as stored:
        logits, labels = stored["scores"], stored["labels"]
    scores = model.score(np.load(finished / "parity.npy"))
    calibrated = logits[:256] / report["temperature"] + report["bias"]
    assert np.abs(scores - 1 / (1 + np.exp(-calibrated))).max() < 1e-4
    assert (model.info.temperature, model.info.bias) == (
        report["temperature"], report["bias"],
    )  # fmt: skip
    assert len(labels) == 256
    assert model.info.gate_threshold == pytest.approx(gate_of(finished), abs=1e-6)


def gate_of(run: Path) -> float:
    """The gate that the validation samples which calibrate ask for, as a score."""
    config, _ = load_network(run)
    report = json.loads((run / "report.json").read_text())
    with np.load(run / "validation.npz") as stored, TemporaryDirectory() as cache:
        sources = pictures_of(config, run, Path(cache) / "sources.rgb")
        calibrates = ~samples_of(config, sources, "val").is_test()
        logits = np.maximum(stored["scores"], stored["within"]).astype(float)[calibrates]
        labels = stored["labels"][calibrates] > 0
    threshold = report["threshold"]
    scores = 1 / (1 + np.exp(-(logits / report["temperature"] + report["bias"])))
    return gate_for(scores, labels, threshold)


def test_an_export_replaces_nothing_but_a_model(
    run_here: Run, finished: Path, exported: Path, tmp_path: Path
) -> None:
    log, pipe, model = (tmp_path / name for name in ("log.db", "pipe", "model.onnx"))
    MatchLog.open(log).close()
    os.mkfifo(pipe)
    kept = log.read_bytes()
    notes = tmp_path / "notes.json"
    notes.write_text("mine")
    for output in (log, pipe, notes):
        refused = run_here("pic-export", finished, "--output", output)
        assert refused.returncode == 2
        assert "is there and no ONNX file" in refused.stderr
    assert log.read_bytes() == kept and pipe.is_fifo()
    for content in (b"", exported.read_bytes()):
        model.write_bytes(content)
        _check_output(model)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_another_precision_is_smaller_and_says_what_it_costs(
    run_tool: Run, finished: Path, exported: Path, tmp_path: Path, precision: str
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    output = tmp_path / "model.onnx"
    options = ["--output", output, "--precision", precision, "--max-loss", 0.5]
    result = run_tool("pic-export", run, *options)
    assert result.returncode == 0, result.stderr
    assert output.stat().st_size < 0.6 * exported.stat().st_size
    assert (
        f"{precision} against fp32, on the run's test pictures: accuracy" in result.stdout
    )
    if precision == "int8":  # a ReLU that is left computes in fp32
        assert "Relu" not in {node.op_type for node in onnx.load(output).graph.node}
        assert what_decides_is_exact(output)

    images = np.load(run / "parity.npy")
    plain, other = (load_model(path, "cpu") for path in (exported, output))
    assert other.info.precision == precision
    assert np.abs(plain.score(images) - other.score(images)).max() < 0.1
    cost = json.loads((run / f"export-{precision}.json").read_text())
    assert other.info.threshold == cost["threshold"]
    assert other.info.gate_threshold <= other.info.threshold
    assert other.info.gate_threshold == pytest.approx(plain.info.gate_threshold, abs=0.1)
    assert other.info.fpr == cost["after"]["false_positive_rate"]["value"]
    assert cost["before"]["recall"]["value"] == pytest.approx(
        json.loads((run / "report.json").read_text())["recall"]["value"]
    )


def test_a_precision_that_costs_too_much_is_refused(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pic_daemon.errors import InputError
    from pic_training import precision
    from pic_training.export import export_run

    run = Path(shutil.copytree(finished, tmp_path / "run"))
    output = tmp_path / "model.onnx"
    # A range learnt from nothing but grey cuts off what real pictures stir up.
    blind = precision._Samples
    monkeypatch.setattr(
        precision, "_Samples", lambda images: blind(np.full_like(images, 128))
    )
    with pytest.raises(InputError, match=r"falls by .* more than the 2.00% allowed"):
        export_run(run, output, "int8")
    assert not output.exists()


def test_a_resnet50_is_trained_and_exported_alike(
    run_tool: Run, folders: Path, tmp_path: Path
) -> None:
    changes = {"arch": "resnet50", "weights": "none", "epochs": 1, "train-images": 8,
               "batch-size": 8, "head-start": 16, "stages": 1}  # fmt: skip
    trained = run_tool("pic-train", *options(folders, tmp_path / "run", **changes))
    assert trained.returncode == 0, trained.stderr
    assert "head fitted on 16 samples" in trained.stdout
    output = tmp_path / "model.onnx"
    exported = run_tool("pic-export", tmp_path / "run", "--output", output)
    assert exported.returncode == 0, exported.stderr
    info = load_model(output, "cpu").info
    assert (info.architecture, info.input_size) == ("resnet50", 224)


def test_a_cnn_that_learned_names_is_exported_in_fp32_and_int8_without_them(
    run_tool: Run, folders: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    changes = {"arch": "cnn", "epochs": 1, "naming": 1, "train-images": 64}
    trained = run_tool("pic-train", *options(folders, run, **changes))
    assert trained.returncode == 0, trained.stderr
    assert json.loads((run / "config.json").read_text())["naming"] == 1
    _, network = load_network(run)
    assert sum(p.numel() for p in network.parameters()) == 25_167_785
    for precision in ("fp32", "int8"):
        output = tmp_path / f"{precision}.onnx"
        exported = run_tool("pic-export", run, "--output", output,
                            "--precision", precision, "--max-loss", 1)  # fmt: skip
        assert exported.returncode == 0, exported.stderr
        assert "256 real samples" in exported.stdout
        info = load_model(output, "cpu").info
        assert (info.architecture, info.input_size) == ("cnn", 64)
        assert what_decides_is_exact(output)


def test_a_link_stays_and_what_it_names_is_replaced(
    finished: Path, exported: Path, run_here: Run, tmp_path: Path
) -> None:
    served, link = tmp_path / "served.onnx", tmp_path / "link.onnx"
    served.touch()
    link.symlink_to(served)
    result = run_here("pic-export", finished, "--output", link)
    assert result.returncode == 0, result.stderr
    assert link.is_symlink() and not served.is_symlink()
    assert load_model(served, "cpu").info.threshold == load_model(exported).info.threshold


class _Directions(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return normalize(images.flatten(1)[:, :8].double(), dim=1).float()


def test_a_cosine_that_lies_at_the_threshold_does_not_keep_a_descriptor_back(
    config_of: Callable[..., RunConfig], tmp_path: Path
) -> None:
    images = np.random.default_rng(0).integers(1, 256, (256, 4, 4, 3), np.uint8)
    network = _Directions()
    known = network(torch.from_numpy(images)).numpy()
    config = config_of(task="describe", arch="cnn", dimensions=8, naming=None)
    report = {"threshold": float((known @ known.T)[3, 5]), "catalog_digest": "",
              "catalog_size": 1, "versions": {}}  # fmt: skip

    def proved(by: float, **changes: Any) -> Parity:
        def read(_: Path) -> Callable[[Pixels], Floats]:
            return lambda images: network(torch.from_numpy(images)).numpy() - np.float32(by)

        export = _descriptor(tmp_path, config, network, report)  # type: ignore[arg-type]
        return _prove(replace(export, read=read, **changes), tmp_path / "d.onnx", images)

    assert 0 < proved(1e-7).max_difference < 1e-6
    with pytest.raises(InputError, match=r"\b[1-9]\d* decisions flipped"):
        proved(2e-5, slack=1e-6)
    with pytest.raises(InputError, match=r"\b0 decisions flipped"):
        proved(1.5e-4, above=lambda cosines: cosines + 2)


def what_decides_is_exact(model: Path) -> bool:
    """Whether the last layer's inputs come from nothing that int8 rounded."""
    nodes = onnx.load(model).graph.node
    made_by = {name: node.op_type for node in nodes for name in node.output}
    decides = [node for node in nodes if node.op_type in ("Gemm", "MatMul")][-1]
    return "DequantizeLinear" not in {made_by.get(name) for name in decides.input}


def test_a_run_that_does_not_agree_with_its_export_leaves_no_file(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pic_daemon.errors import InputError
    from pic_training import export

    monkeypatch.setattr(export, "TOLERANCE", 0.0)  # no two runtimes agree to the last bit
    with pytest.raises(
        InputError, match=r"disagrees with PyTorch: its scores differ by up to"
    ):
        export.export_run(finished, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_no_file_is_left_where_its_cost_cannot_be_written_down(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pic_daemon.errors import InputError
    from pic_training import export

    def refused(path: Path, _: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(export, "write_json", refused)
    with pytest.raises(InputError, match=r"export-fp16.json: Permission denied"):
        export.export_run(finished, tmp_path / "model.onnx", "fp16", 1.0)
    assert list(tmp_path.iterdir()) == []


def test_export_refuses_what_is_no_finished_run(run_here: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases = {"none": "does not exist", "empty": "holds no finished epoch"}
    for name, sentence in cases.items():
        result = run_here(
            "pic-export", tmp_path / name, "--output", tmp_path / "model.onnx"
        )
        assert result.returncode == 2
        assert sentence in result.stderr
    assert not (tmp_path / "model.onnx").exists()
