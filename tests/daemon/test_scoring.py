import queue
from pathlib import Path

import numpy as np
import pytest
from conftest import SIZE

from pic_daemon.folders import FileStamp
from pic_daemon.images import DecodedImage
from pic_daemon.model import load_model
from pic_daemon.reading import Reading
from pic_daemon.scoring import Scored, Scorer

STAMP = FileStamp(1, 1, 1)


def reading(name: str, side: int) -> Reading:
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
    return Reading(name, STAMP, "00", DecodedImage(pixels, side, side, "PNG"))


def test_a_batch_comes_back_with_a_verdict_for_each_image_and_none_for_what_has_none(
    model_file: Path,
) -> None:
    model, inbox = load_model(model_file, "cpu"), queue.SimpleQueue[Scored | Exception]()
    batch = [reading("a", SIZE), Reading("b", STAMP, error="truncated"), reading("c", SIZE)]
    with Scorer(inbox.put) as scorer:
        scorer.begin(model, batch)
        scored = inbox.get(timeout=60)
    assert isinstance(scored, Scored)
    assert (scored.model, scored.readings) == (model, batch)
    first, none, last = scored.verdicts
    assert none is None
    assert first and last and first.score == pytest.approx(last.score)


def test_an_error_of_the_network_comes_back_too(model_file: Path) -> None:
    inbox = queue.SimpleQueue[Scored | Exception]()
    with Scorer(inbox.put) as scorer:
        scorer.begin(load_model(model_file, "cpu"), [reading("a", SIZE + 1)])
        assert isinstance(inbox.get(timeout=60), Exception)
