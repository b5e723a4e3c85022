from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import OPSET, SIZE, write_model
from onnx import TensorProto, helper

from pic_daemon.descriptor import DescriptorInfo, load_descriptor
from pic_daemon.errors import InputError

INFO = DescriptorInfo(
    architecture="mean colour",
    input_size=SIZE,
    dimensions=3,
    resize_filter="bilinear",
    color="sRGB",
    catalog_digest="0" * 64,
    catalog_size=1,
    training_run="none",
    created_at="2026-01-01T00:00:00Z",
    versions="{}",
)


def write_descriptor(
    path: Path, metadata: dict[str, str] | None = None, length: float = 1.0
) -> Path:
    """A real ONNX descriptor: the direction of the mean colour, times `length`."""
    images = helper.make_tensor_value_info(
        "images", TensorProto.UINT8, ["N", SIZE, SIZE, 3]
    )
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", 3])
    constants = [
        helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2]),
        helper.make_tensor("last", TensorProto.INT64, [1], [1]),
        helper.make_tensor("length", TensorProto.FLOAT, [], [length]),
    ]
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float", "axes"], ["mean"], keepdims=0),
        helper.make_node("ReduceL2", ["mean", "last"], ["norm"], keepdims=1),
        helper.make_node("Div", ["mean", "norm"], ["unit"]),
        helper.make_node("Mul", ["unit", "length"], ["embedding"]),
    ]
    graph = helper.make_graph(nodes, "colour", [images], [embedding], constants)
    model = helper.make_model(graph, opset_imports=[OPSET], ir_version=10)
    helper.set_model_props(model, INFO.to_metadata() if metadata is None else metadata)
    onnx.save_model(model, path)
    return path


def test_a_picture_becomes_one_vector_of_length_one(tmp_path: Path) -> None:
    descriptor = load_descriptor(write_descriptor(tmp_path / "describe.onnx"))
    assert descriptor.info == INFO
    images = np.zeros((3, SIZE, SIZE, 3), np.uint8)
    images[0, :, :, 0], images[1, :, :, 1], images[2] = 200, 7, 90
    embedding = descriptor.describe(images)
    assert embedding.dtype == np.float32
    assert embedding == pytest.approx(
        np.array([[1, 0, 0], [0, 1, 0], [3**-0.5] * 3]), abs=1e-6
    )


def metadata(**changes: str) -> dict[str, str]:
    return {**INFO.to_metadata(), **changes}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "not one of ours"),
        (metadata(format_version="2"), "Upgrade product-image"),
        (metadata(format_version="two"), "not a number"),
        (metadata(dimensions="many"), "unusable metadata"),
        (metadata(input_size="17"), "does not take images of 17 x 17"),
        (metadata(dimensions="4"), r"shape \(2, 3\) for two images, not \(2, 4\)"),
    ],
)
def test_a_file_that_is_no_descriptor_of_ours_is_refused(
    tmp_path: Path, given: dict[str, str], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        load_descriptor(write_descriptor(tmp_path / "describe.onnx", given))


def test_a_classifier_is_not_taken_for_a_descriptor(tmp_path: Path) -> None:
    classifier = write_model(tmp_path / "model.onnx")
    with pytest.raises(InputError, match="says product-image-classifier, not product-"):
        load_descriptor(classifier)


@pytest.mark.parametrize(
    ("length", "sentence"),
    [(float("nan"), "no numbers"), (1.01, r"length 1.01, not 1"), (0.0, "length 0")],
)
def test_embeddings_that_are_not_of_length_one_are_refused(
    tmp_path: Path, length: float, sentence: str
) -> None:
    path = write_descriptor(tmp_path / "describe.onnx", length=length)
    with pytest.raises(InputError, match=sentence):
        load_descriptor(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"describe\.onnx: No such file"):
        load_descriptor(tmp_path / "describe.onnx")
