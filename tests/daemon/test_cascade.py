"""The second stage: the service with a descriptor and a catalog index, as a process."""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from conftest import DaemonProcess, write_descriptor, write_image
from pictures import product, write_products
from PIL import Image, ImageOps

from pic_daemon.descriptor import load_descriptor
from pic_daemon.identification import CloserReading, look_closer
from pic_daemon.index_cli import open_or_empty
from pic_daemon.indexing import update, workers
from pic_daemon.reading import Reading, read_image

Tool = Callable[..., CompletedProcess[str]]
Indexed = Callable[..., Path]


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with workers() as pool:
        yield pool


@pytest.fixture
def indexed(tmp_path: Path, descriptor_file: Path, pool: ProcessPoolExecutor) -> Indexed:
    """Make or update the index of the products with these seeds."""

    def run(*seeds: int, descriptor: Path = descriptor_file) -> Path:
        write_products(tmp_path / "catalog", seeds)
        loaded, output = load_descriptor(descriptor, "cpu"), tmp_path / "catalog.index"
        index = open_or_empty(output, tmp_path / "catalog", loaded)
        update(index, loaded, pool, lambda _: None)
        index.save()
        return output

    return run


def drop(daemon: DaemonProcess, name: str, picture: Image.Image) -> None:
    picture.save(daemon.drop / name, quality=60)


def rows(daemon: DaemonProcess, count: int) -> dict[str, dict[str, object]]:
    return {Path(str(row["path"])).name: row for row in daemon.wait_for_rows(count)}


def test_a_match_names_its_catalog_item_and_the_runner_up(
    daemon: DaemonProcess, indexed: Indexed, descriptor_file: Path
) -> None:
    daemon.start("--describe", descriptor_file, "--index", indexed(1, 2, 3, 4))
    for seed in (1, 2, 3, 4):
        drop(daemon, f"small-{seed}.jpg", product(seed).resize((120, 120)))
    drop(daemon, "mirrored.jpg", ImageOps.mirror(product(2)))
    drop(daemon, "grey.jpg", product(1).convert("L"))
    drop(daemon, "framed.jpg", ImageOps.expand(product(3), 77, fill=(200, 30, 90)))
    drop(daemon, "strange.jpg", product(900))
    found = rows(daemon, 8)
    others = ("mirrored.jpg", 2), ("grey.jpg", 1), ("framed.jpg", 3)
    for name, seed in [*((f"small-{n}.jpg", n) for n in (1, 2, 3, 4)), *others]:
        row = found[name]
        assert (row["status"], row["catalog_item"]) == ("match", f"product-{seed:05d}.jpg")
        assert float(str(row["similarity"])) > 0.7
        assert row["runner_up"] not in (None, row["catalog_item"])
        assert float(str(row["joint_score"])) >= float(str(row["joint_threshold"]))
    strange = found["strange.jpg"]
    assert strange["status"] == "no-match"
    assert strange["catalog_index"] == found["small-1.jpg"]["catalog_index"]


def test_an_item_whose_name_is_not_utf8_is_named_and_told_readably(
    daemon: DaemonProcess, indexed: Indexed, descriptor_file: Path, tmp_path: Path
) -> None:
    (picture,) = write_products(tmp_path / "catalog", [1])
    os.rename(picture, os.path.join(os.fsencode(picture.parent), b"caf\xe9.jpg"))
    told = tmp_path / "told"
    daemon.start(
        "--describe",
        descriptor_file,
        "--index",
        indexed(2),
        "--command",
        f"/usr/bin/tee {told}",
    )
    drop(daemon, "small.jpg", product(1).resize((120, 120)))
    (row,) = daemon.wait_for_rows(1)
    assert (row["status"], row["catalog_item"]) == ("match", "caf\\xe9.jpg")
    daemon.wait_until(lambda: told.exists() and told.read_text().endswith("\n"))
    assert json.loads(told.read_text())["catalog_item"] == "caf\\xe9.jpg"


def test_without_the_two_files_the_score_alone_decides(daemon: DaemonProcess) -> None:
    daemon.start()
    write_image(daemon.drop / "white.png", 230)
    (row,) = daemon.wait_for_rows(1)
    assert row["status"] == "match"
    assert row["threshold"] == 0.5
    assert row["catalog_item"] is row["catalog_index"] is row["joint_score"] is None


def test_what_the_gate_keeps_out_is_not_looked_up(
    daemon: DaemonProcess, indexed: Indexed, descriptor_file: Path
) -> None:
    daemon.start(
        "--describe", descriptor_file, "--index", indexed(1, 2), "--gate-threshold", 0.5
    )
    dark = product(1).point(lambda level: level // 4)  # the test model scores brightness
    drop(daemon, "dark.jpg", dark)
    drop(daemon, "as-it-is.jpg", product(1))
    found = rows(daemon, 2)
    assert found["as-it-is.jpg"]["status"] == "match"
    assert found["dark.jpg"]["status"] == "no-match"
    assert found["dark.jpg"]["catalog_index"] is None
    assert found["dark.jpg"]["threshold"] == 0.5


def test_the_gate_looks_within_a_border_as_well(
    daemon: DaemonProcess, indexed: Indexed, descriptor_file: Path
) -> None:
    daemon.start(
        "--describe", descriptor_file, "--index", indexed(1, 2), "--gate-threshold", 0.5
    )
    framed = ImageOps.expand(product(1), 90, fill=(9, 9, 9))  # dark as a whole
    drop(daemon, "framed.jpg", framed)
    (row,) = daemon.wait_for_rows(1)
    assert (row["status"], row["catalog_item"]) == ("match", "product-00001.jpg")


def test_a_nearly_uniform_picture_never_matches(
    daemon: DaemonProcess, indexed: Indexed, descriptor_file: Path
) -> None:
    daemon.start("--describe", descriptor_file, "--index", indexed(1, 2))
    Image.new("RGB", (256, 256), (240, 240, 240)).save(daemon.drop / "white.png")
    (row,) = daemon.wait_for_rows(1)
    assert row["status"] == "no-match"
    assert "nearly uniform" in str(row["error"])


def test_a_picture_that_the_descriptor_gives_no_numbers_for_is_no_match_and_says_so(
    daemon: DaemonProcess, indexed: Indexed, tmp_path: Path
) -> None:
    descriptor = write_descriptor(tmp_path / "blinded.onnx", blinded=225)
    daemon.start("--describe", descriptor, "--index", indexed(1, 2, descriptor=descriptor))
    bright = Image.blend(product(1), Image.new("RGB", product(1).size, "white"), 0.8)
    drop(daemon, "bright.jpg", bright)
    drop(daemon, "as-it-is.jpg", product(1))
    found = rows(daemon, 2)
    assert found["as-it-is.jpg"]["status"] == "match"
    assert found["bright.jpg"]["status"] == "no-match"
    assert "gave no numbers" in str(found["bright.jpg"]["error"])


def test_a_damaged_file_fails_beside_good_ones(
    daemon: DaemonProcess, indexed: Indexed, descriptor_file: Path
) -> None:
    daemon.start("--describe", descriptor_file, "--index", indexed(1, 2))
    data = (daemon.drop.parent / "catalog" / "product-00001.jpg").read_bytes()
    (daemon.drop / "half.jpg").write_bytes(data[: len(data) // 2])
    drop(daemon, "whole.jpg", product(2))
    found = rows(daemon, 2)
    assert found["half.jpg"]["status"] == "failed"
    assert found["whole.jpg"]["status"] == "match"


def test_a_new_item_is_found_once_the_index_file_is_replaced(
    daemon: DaemonProcess, indexed: Indexed, descriptor_file: Path
) -> None:
    daemon.start("--describe", descriptor_file, "--index", indexed(1, 2))
    drop(daemon, "before.jpg", product(3))
    assert rows(daemon, 1)["before.jpg"]["status"] == "no-match"
    indexed(3)
    daemon.wait_until(lambda: "now serving index" in daemon.log.read_text())
    drop(daemon, "after.jpg", product(3))
    found = rows(daemon, 2)
    assert found["after.jpg"]["catalog_item"] == "product-00003.jpg"
    assert found["after.jpg"]["catalog_index"] != found["before.jpg"]["catalog_index"]


def test_no_file_goes_without_its_row_while_the_index_is_replaced(
    daemon: DaemonProcess, indexed: Indexed, descriptor_file: Path
) -> None:
    daemon.start("--describe", descriptor_file, "--index", indexed(1, 2))
    for round_ in range(4):
        for number in range(5):
            size = 100 + 5 * round_ + number  # other bytes each time
            drop(daemon, f"{round_}-{number}.jpg", product(1).resize((size, size)))
        indexed(3 + round_)
    found = rows(daemon, 20)
    assert {row["catalog_item"] for row in found.values()} == {"product-00001.jpg"}
    assert {row["status"] for row in found.values()} == {"match"}
    daemon.wait_until(lambda: "6 items" in daemon.log.read_text())
    assert "ERROR" not in daemon.log.read_text()


def test_what_an_older_index_decided_is_done_again_on_reclassify(
    daemon: DaemonProcess, indexed: Indexed, descriptor_file: Path, run_tool: Tool
) -> None:
    files = "--describe", descriptor_file, "--index", indexed(1, 2)
    daemon.start(*files)
    drop(daemon, "a.jpg", product(3))
    drop(daemon, "b.jpg", product(1))
    rows(daemon, 2)
    daemon.stop()
    indexed(3)
    daemon.start(*files)
    result = run_tool("pic-daemon", "reclassify", "--database", daemon.database)
    assert "2 images" in result.stdout
    daemon.reload()
    daemon.wait_until(lambda: daemon.rows()[0]["catalog_item"] == "product-00003.jpg")
    result = run_tool("pic-daemon", "reclassify", "--database", daemon.database)
    assert "0 images" in result.stdout


def test_a_bad_index_changes_nothing_while_the_service_runs(
    daemon: DaemonProcess, indexed: Indexed, descriptor_file: Path, tmp_path: Path
) -> None:
    index = indexed(1, 2)
    daemon.start("--describe", descriptor_file, "--index", index)
    other = write_descriptor(tmp_path / "other.onnx", -1.0)
    kept = index.read_bytes()
    index.unlink()
    made_by_another = indexed(1, 2, descriptor=other).read_bytes()
    for content, words in ((made_by_another, "another descriptor"), (b"x", "no catalog")):
        index.write_bytes(content)
        daemon.wait_until(lambda words=words: words in daemon.log.read_text())  # type: ignore[misc]
        assert "The index in use goes on serving" in daemon.log.read_text()
        drop(daemon, f"{len(content)}.jpg", product(1))
        rows(daemon, 1)
    index.write_bytes(kept)
    drop(daemon, "last.jpg", product(2))
    assert {row["status"] for row in rows(daemon, 3).values()} == {"match"}


@pytest.mark.parametrize("what", ["run", "check"])
def test_files_that_do_not_belong_together_are_refused_at_start(
    what: str, daemon: DaemonProcess, indexed: Indexed, run_tool: Tool, tmp_path: Path
) -> None:
    other = write_descriptor(tmp_path / "other.onnx", -1.0)
    result = run_tool(
        "pic-daemon", what, "--watch", daemon.drop, "--model", daemon.model,
        "--database", daemon.database, "--describe", other, "--index", indexed(1),
    )  # fmt: skip
    assert result.returncode == 2
    assert "was made with another descriptor" in result.stderr
    assert "Traceback" not in result.stderr


def test_one_of_the_two_files_alone_is_refused(
    daemon: DaemonProcess, run_here: Tool, descriptor_file: Path
) -> None:
    result = run_here(
        "pic-daemon", "check", "--watch", daemon.drop, "--model", daemon.model,
        "--database", daemon.database, "--describe", descriptor_file,
    )  # fmt: skip
    assert result.returncode == 2
    assert "give --describe and --index" in result.stderr


def test_check_and_start_say_what_changed_in_the_catalog(
    daemon: DaemonProcess,
    indexed: Indexed,
    descriptor_file: Path,
    run_tool: Tool,
    tmp_path: Path,
) -> None:
    files = "--describe", descriptor_file, "--index", indexed(1, 2)
    write_products(tmp_path / "catalog", [7])
    result = run_tool(
        "pic-daemon", "check", "--watch", daemon.drop, "--model", daemon.model,
        "--database", daemon.database, *files,
    )  # fmt: skip
    assert "index " in result.stdout
    assert "1 new ('product-00007.jpg')" in result.stdout
    daemon.start(*files)
    daemon.wait_until(lambda: "1 new ('product-00007.jpg')" in daemon.log.read_text())


def test_single_files_are_named_too(
    indexed: Indexed,
    run_tool: Tool,
    descriptor_file: Path,
    model_file: Path,
    tmp_path: Path,
) -> None:
    index = indexed(1, 2, 3)
    for seed in (2, 900):
        product(seed).resize((140, 140)).save(tmp_path / f"{seed}.jpg")
    result = run_tool(
        "pic-classify", "--model", model_file, "--describe", descriptor_file, "--index",
        index, "--json", tmp_path / "2.jpg", tmp_path / "900.jpg",
    )  # fmt: skip
    known, strange = map(json.loads, result.stdout.splitlines())
    assert (known["status"], known["catalog_item"]) == ("match", "product-00002.jpg")
    assert known["runner_up"] not in (None, known["catalog_item"])
    assert strange["status"] == "no-match"


def test_a_single_file_that_gets_no_numbers_says_so_too(
    indexed: Indexed, run_here: Tool, model_file: Path, tmp_path: Path
) -> None:
    descriptor = write_descriptor(tmp_path / "blinded.onnx", blinded=225)
    bright = Image.blend(product(1), Image.new("RGB", product(1).size, "white"), 0.8)
    bright.save(tmp_path / "bright.jpg", quality=60)
    result = run_here(
        "pic-classify", "--model", model_file, "--describe", descriptor, "--index",
        indexed(1, 2, descriptor=descriptor), "--json", tmp_path / "bright.jpg",
    )  # fmt: skip
    row = json.loads(result.stdout)
    assert row["status"] == "no-match"
    assert "gave no numbers" in row["error"]


def test_pic_classify_takes_a_gate_of_its_own(
    indexed: Indexed,
    run_here: Tool,
    descriptor_file: Path,
    model_file: Path,
    tmp_path: Path,
) -> None:
    archive = tmp_path / "archive"
    archive.mkdir()
    product(2).resize((140, 140)).save(archive / "2.jpg")
    options: list[object] = ["--model", model_file, "--describe", descriptor_file]
    options += ["--index", indexed(1, 2, 3)]
    ways = [["--json", archive / "2.jpg"], ["--recursive", archive, "--database"]]
    for gate, status in ((0, "match"), (1, "no-match")):
        gated = [*options, "--gate-threshold", gate]
        one = json.loads(run_here("pic-classify", *gated, *ways[0]).stdout)
        assert (one["status"], one["threshold"]) == (status, gate)
        all_ = run_here("pic-classify", *gated, *ways[1], tmp_path / f"{gate}.db")
        assert all_.stdout.startswith(f"1 {status};")
    alone = run_here("pic-classify", "--model", model_file, "--gate-threshold", 1, *ways[0])
    assert alone.returncode == 2
    assert "--gate-threshold goes with --describe and --index" in alone.stderr


def test_a_file_that_is_another_by_the_second_look_is_read_anew(tmp_path: Path) -> None:
    (path,) = write_products(tmp_path, [1])
    before = read_image(str(path), 64)
    (seen,) = look_closer(str(path), before.sha256, 64, 10**8)
    assert isinstance(seen, CloserReading)
    product(2).save(path)
    (seen,) = look_closer(str(path), before.sha256, 64, 10**8)
    assert isinstance(seen, Reading)
    assert seen.changed


@pytest.mark.parametrize(
    ("gate", "sentence"),
    [
        (-0.1, "gate_threshold must be at least 0"),
        (1.5, "gate_threshold must be at most 1"),
        ("x", "'--gate-threshold': 'x' is not a valid float"),
    ],
)
def test_a_gate_outside_0_to_1_is_refused(
    gate: object,
    sentence: str,
    daemon: DaemonProcess,
    run_here: Tool,
    descriptor_file: Path,
) -> None:
    result = run_here(
        "pic-daemon", "check", "--watch", daemon.drop, "--model", daemon.model,
        "--database", daemon.database, "--describe", descriptor_file,
        "--index", descriptor_file, "--gate-threshold", gate,
    )  # fmt: skip
    assert result.returncode == 2
    assert sentence in result.stderr
