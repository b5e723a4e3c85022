import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import INFO, SIZE, write_model
from onnx import TensorProto, helper

from pic_daemon.errors import InputError
from pic_daemon.images import DecodedImage, Pixels
from pic_daemon.model import ModelInfo, load_model
from pic_daemon.onnx_session import open_session, run
from pic_daemon.second_look import second_looks


def test_metadata_survives_the_file(model_file: Path) -> None:
    assert load_model(model_file).info == INFO


def test_scores_are_one_probability_per_image(model_file: Path) -> None:
    images = np.stack([np.full((SIZE, SIZE, 3), v, np.uint8) for v in (0, 51, 255)])
    scores = load_model(model_file).score(images)
    assert scores.dtype == np.float32
    assert scores == pytest.approx([0.0, 0.2, 1.0])


@pytest.mark.parametrize("count", [1, 4, 5, 11])
def test_where_runs_have_one_size_the_scores_are_the_same(
    model_file: Path, tmp_path: Path, count: int
) -> None:
    proto = onnx.load(model_file)
    for end in (proto.graph.input[0], proto.graph.output[0]):
        end.type.tensor_type.shape.dim[0].dim_value = 4  # and no other
    onnx.save(proto, tmp_path / "fixed.onnx")
    session = open_session(tmp_path / "fixed.onnx", "cpu").session
    images = np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)
    expected = load_model(model_file, "cpu").score(images)
    assert np.array_equal(run(session, "score", images, 4), expected)


def test_the_verdict_takes_the_threshold_itself_as_a_match(model_file: Path) -> None:
    model = load_model(model_file)
    edge = np.zeros((SIZE, SIZE, 3), np.uint8)
    edge[: SIZE // 2] = 255
    below = edge.copy()
    below[0, 0, 0] = 254
    images = [DecodedImage(pixels, 40, 40, "PNG") for pixels in (edge, below)]
    assert [verdict.status for verdict in model.judge(images)] == ["match", "no-match"]


def test_a_picture_of_which_the_model_says_no_number_never_matches(
    model_file: Path,
) -> None:
    proto = onnx.load(model_file)
    proto.graph.node[-1].output[0] = "raw"
    limit = helper.make_tensor("limit", TensorProto.FLOAT, [], [0.6])
    proto.graph.initializer.append(limit)
    proto.graph.node.extend(
        [
            helper.make_node("Sub", ["limit", "raw"], ["below"]),
            helper.make_node("Sqrt", ["below"], ["score"]),
        ]
    )
    onnx.save_model(proto, model_file)
    bright = np.full((SIZE, SIZE, 3), 200, np.uint8)
    bright[: SIZE // 2] = 250
    (verdict,) = load_model(model_file).judge([DecodedImage(bright, 40, 40, "PNG")])
    assert (verdict.status, verdict.score) == ("no-match", 0.0)
    assert verdict.reason == "the model's score of it is no number"


def framed_dark_and_bright() -> Pixels:
    """Three pictures, the first a bright one in a wide black frame."""
    bright = np.random.default_rng(0).integers(200, 256, (SIZE, SIZE, 3), np.uint8)
    framed = np.zeros_like(bright)
    framed[4:-4, 4:-4] = bright[4:-4, 4:-4]
    return np.stack([framed, bright // 4, bright])


def test_a_second_look_at_a_framed_picture_sees_what_is_within_the_frame(
    model_file: Path,
) -> None:
    model, images = load_model(model_file), framed_dark_and_bright()
    plain, second = model.score(images), model.second_score(images, sure=0.5)
    assert plain[0] < 0.3
    assert second[0] > 0.8
    assert second[1:] == pytest.approx(plain[1:])
    assert model.second_score(images, sure=0.1) == pytest.approx(plain)


def test_of_the_two_looks_the_greater_score_counts(model_file: Path) -> None:
    model = load_model(model_file)
    # A dark picture in a white line, which makes it brighter.
    framed = np.random.default_rng(0).integers(0, 100, (1, SIZE, SIZE, 3), np.uint8)
    framed[:, [0, -1]] = framed[:, :, [0, -1]] = 255
    (within,) = second_looks(framed).values()
    plain = model.score(framed)
    assert model.score(within[None])[0] < plain[0] - 0.1
    assert model.second_score(framed, sure=0.5) == pytest.approx(plain)


@pytest.mark.parametrize("looks_twice", [False, True])
def test_only_a_model_whose_threshold_counts_it_or_a_gate_has_the_second_look(
    tmp_path: Path, looks_twice: bool
) -> None:
    info = replace(INFO, looks_twice=looks_twice)
    model = load_model(write_model(tmp_path / "model.onnx", info.to_metadata()))
    images = framed_dark_and_bright()
    plain, second = model.score(images), model.second_score(images, sure=0.5)

    def judged(gate: float | None = None) -> list[float]:
        seen = [DecodedImage(pixels, 40, 40, "PNG") for pixels in images]
        return [verdict.score for verdict in model.judge(seen, gate)]

    assert judged() == pytest.approx(second if looks_twice else plain)
    assert model.full_score(images) == pytest.approx(judged())
    assert judged(gate=0.5) == pytest.approx(second)
    assert judged(gate=0.1) == pytest.approx(plain)


def test_the_provider_in_use_and_its_reason_are_known(model_file: Path) -> None:
    model = load_model(model_file)
    assert model.provider in {"CPUExecutionProvider", "CUDAExecutionProvider"}
    assert model.provider_reason
    assert load_model(model_file, "cpu").provider == "CPUExecutionProvider"


def test_insisting_on_cuda_without_it_says_why(model_file: Path) -> None:
    if load_model(model_file).provider == "CUDAExecutionProvider":
        pytest.skip("CUDA loads on this machine")
    with pytest.raises(InputError, match=r"CUDA execution provider does not load: .+"):
        load_model(model_file, "cuda")


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({}, "not one of ours"),
        ({**INFO.to_metadata(), "format_version": "2"}, "Upgrade product-image"),
        ({**INFO.to_metadata(), "threshold": "high"}, "unusable metadata"),
        ({**INFO.to_metadata(), "threshold": "95"}, "threshold 95.0 is no score"),
        ({**INFO.to_metadata(), "gate_threshold": "nan"}, "gate_threshold nan is no"),
        ({**INFO.to_metadata(), "temperature": "0"}, "temperature 0.0"),
        ({k: v for k, v in INFO.to_metadata().items() if k != "input_size"}, "input_size"),
        ({**INFO.to_metadata(), "input_size": "17"}, "does not take images of 17 x 17"),
        ({**INFO.to_metadata(), "input_size": "-5"}, "does not take images of -5 x -5"),
    ],
)
def test_a_file_that_is_not_ours_is_refused(
    tmp_path: Path, metadata: dict[str, str], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        load_model(write_model(tmp_path / "model.onnx", metadata))


def test_a_file_that_is_no_onnx_model_is_refused(tmp_path: Path) -> None:
    garbage = tmp_path / "model.onnx"
    garbage.write_bytes(b"not a model at all")
    with pytest.raises(InputError, match=r"is not an ONNX model"):
        load_model(garbage)
    with pytest.raises(InputError, match="No such file"):
        load_model(tmp_path / "missing.onnx")


def test_a_model_that_returns_nan_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.onnx")
    model = onnx.load_model(path)
    white = next(c for c in model.graph.initializer if c.name == "white")
    white.CopyFrom(helper.make_tensor("white", TensorProto.FLOAT, [], [0.0]))
    onnx.save_model(model, path)
    with pytest.raises(InputError, match="finite score"):
        load_model(path)


def test_a_format_version_that_is_no_number_is_refused() -> None:
    with pytest.raises(InputError, match="not a number"):
        ModelInfo.from_metadata({**INFO.to_metadata(), "format_version": ""}, Path("m"))


@pytest.mark.skipif(os.cpu_count() == 1, reason="the machine has one core")
def test_a_process_bound_to_one_core_takes_no_more(model_file: Path) -> None:
    """onnxruntime by itself would start a thread for each core, and bind it there."""
    script = (
        "import os, sys; from pathlib import Path\n"
        "os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])\n"
        "from pic_daemon.config import Config\n"
        "from pic_daemon.onnx_session import open_session\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "opened = open_session(Path(sys.argv[1]), 'cpu')\n"
        "threads = len(os.listdir('/proc/self/task')) - before\n"
        "print(Config((), Path('m'), Path('d')).readers, threads)\n"
    )
    command = [sys.executable, "-c", script, model_file]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["1", "0"]
