"""pic-index and the file it writes, on drawn products."""

import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import BIN, write_descriptor
from pictures import product, write_products
from PIL import Image, ImageOps

from pic_daemon import index_cli, indexing
from pic_daemon.catalog_index import CatalogIndex, Refused, check_belongs, load_index
from pic_daemon.decoys import _promise
from pic_daemon.descriptor import load_descriptor
from pic_daemon.errors import InputError
from pic_daemon.folders import FileStamp
from pic_daemon.identification import look_at
from pic_daemon.images import to_pixels
from pic_daemon.index_cli import open_or_empty
from pic_daemon.indexing import find_twins, update, workers
from pic_daemon.lock import lock
from pic_daemon.margins import within_margins

Tool = Callable[..., CompletedProcess[str]]


@pytest.fixture
def make(run_tool: Tool, tmp_path: Path, descriptor_file: Path) -> Tool:
    """Run pic-index on the folder `catalog`, which must succeed."""

    def run(*options: object) -> CompletedProcess[str]:
        result = run_tool(
            "pic-index", "--catalog", tmp_path / "catalog", "--model", descriptor_file,
            "--output", tmp_path / "catalog.index", *options,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return result

    return run


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of products 0 to 3, which tests only read; its catalog is beside it."""
    home = tmp_path_factory.mktemp("ready")
    write_products(home / "catalog" / "deep", range(4))
    descriptor = load_descriptor(write_descriptor(home / "describe.onnx"), "cpu")
    index = open_or_empty(home / "catalog.index", home / "catalog", descriptor)
    with workers() as pool:
        update(index, descriptor, pool, lambda _: None)
    index.save()
    return index.path


def test_workers_end_with_a_parent_that_is_killed() -> None:
    script = (
        "import os, time; from pic_daemon.indexing import workers\n"
        "if __name__ == '__main__':\n"
        "  with workers() as pool:\n"
        "    print(pool.submit(os.getpid).result(), flush=True); time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert parent.stdout
    worker = Path("/proc", parent.stdout.readline().decode().strip())
    assert worker.exists()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    with suppress(OSError):  # once it is gone
        while "\nState:\tZ" not in (worker / "status").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_process_that_is_killed_ends_the_work_with_a_sentence() -> None:
    with pytest.raises(InputError, match="where memory runs out"), workers() as pool:
        pool.submit(os._exit, 1).result()


def names(index: Path) -> list[str]:
    return sorted(item.name for item in load_index(index).items.values())


def nearest(
    index: CatalogIndex, descriptor: Path, picture: Image.Image
) -> tuple[str, float]:
    loaded = load_descriptor(descriptor, "cpu")
    pixels = to_pixels(picture, loaded.info.input_size)
    found = index.look_up(loaded.describe(pixels[None]))[0][0]
    return found.item, found.similarity


def test_a_picture_finds_itself_as_it_is_mirrored_grey_and_without_its_margins(
    ready: Path,
) -> None:
    index = load_index(ready)
    for seed in range(4):
        whole = product(seed)
        grey, within = whole.convert("L").convert("RGB"), within_margins(whole)
        assert within
        for picture in (whole, ImageOps.mirror(whole), grey, within):
            item, similarity = nearest(index, ready.with_name("describe.onnx"), picture)
            assert item == f"deep/product-{seed:05d}.jpg"
            assert similarity > 0.98


def test_what_a_link_names_is_written_and_the_link_stays(
    ready: Path, tmp_path: Path
) -> None:
    served, link = tmp_path / "served.index", tmp_path / "link.index"
    served.touch()
    link.symlink_to(served)
    load_index(ready).save(link)
    assert link.is_symlink() and load_index(served).items == load_index(ready).items


def test_landmarks_come_back_from_the_file_as_they_were_made(ready: Path) -> None:
    index = load_index(ready)
    for number, item in index.items.items():
        data = (ready.with_name("catalog") / item.name).read_bytes()
        assert index.landmarks(number) == look_at(data, 64).landmarks.to_bytes()


def test_a_second_run_adds_drops_renames_and_leaves_the_rest(
    make: Tool, tmp_path: Path
) -> None:
    catalog = tmp_path / "catalog"
    paths = write_products(catalog, range(6))
    make()
    paths[0].unlink()
    paths[1].rename(catalog / "renamed.jpg")
    product(50).save(paths[2])
    write_products(catalog, [60])
    result = make()
    assert "6 items; 2 added, 2 removed, 1 renamed, 0 refused" in result.stdout
    assert names(tmp_path / "catalog.index") == [
        "product-00002.jpg", "product-00003.jpg", "product-00004.jpg",
        "product-00005.jpg", "product-00060.jpg", "renamed.jpg",
    ]  # fmt: skip
    assert "6 items; 0 added, 0 removed, 0 renamed" in make().stdout


def test_an_updated_index_answers_as_one_made_at_once(
    make: Tool, tmp_path: Path, descriptor_file: Path
) -> None:
    catalog = tmp_path / "catalog"
    write_products(catalog, range(5))
    make()
    (catalog / "product-00003.jpg").unlink()
    write_products(catalog, range(5, 9))
    make()
    updated = load_index(tmp_path / "catalog.index")
    (tmp_path / "catalog.index").unlink()
    make()
    anew = load_index(tmp_path / "catalog.index")
    for seed in range(10):
        expected = nearest(anew, descriptor_file, product(seed))
        found = nearest(updated, descriptor_file, product(seed))
        assert found == (expected[0], pytest.approx(expected[1], abs=1e-3))


def test_blank_unreadable_and_repeated_files_are_refused_by_name(
    make: Tool, tmp_path: Path
) -> None:
    catalog = tmp_path / "catalog"
    (first,) = write_products(catalog, [1])
    Image.new("RGB", (300, 300), (250, 250, 250)).save(catalog / "white.png")
    (catalog / "broken.jpg").write_bytes(b"no picture")
    with (catalog / "huge.jpg").open("wb") as huge:
        huge.truncate(2 << 30)
    shutil.copy(first, catalog / "twice.jpg")
    (catalog / "phone.HEIC").touch()
    output = make().stdout
    assert "note: 1 files are no images by their names: 1 .heic\n" in output
    assert "refused white.png: nearly uniform picture" in output
    assert "refused broken.jpg: not an image" in output
    assert "refused huge.jpg: larger than" in output
    assert "refused twice.jpg: same bytes as product-00001.jpg" in output
    assert names(tmp_path / "catalog.index") == ["product-00001.jpg"]


def test_what_was_refused_can_be_listed_beyond_what_is_said(
    make: Tool, run_tool: Tool, tmp_path: Path
) -> None:
    write_products(tmp_path / "catalog", [1])
    for number in range(25):
        (tmp_path / "catalog" / f"broken-{number}.jpg").write_bytes(b"no picture")
    output = make().stdout
    assert output.count("refused broken-") == 20
    assert "... and 5 more" in output
    listed = run_tool("pic-index", "--output", tmp_path / "catalog.index", "--list").stdout
    assert listed.count("refused broken-") == 25


def test_what_was_refused_is_indexed_once_the_reason_is_gone(
    make: Tool, tmp_path: Path
) -> None:
    catalog, output = tmp_path / "catalog", tmp_path / "catalog.index"
    first, locked, _ = write_products(catalog, [1, 2, 3])
    shutil.copy(first, catalog / "twice.jpg")
    make()
    # As if the second had been shut to this user then; root can read everything.
    index = load_index(output)
    (number,) = (n for n, item in index.items.items() if item.name == locked.name)
    stamp = FileStamp.of(locked.stat())
    reason = "cannot be read: Permission denied"
    index.refused.append(Refused(locked.name, stamp.bytes, stamp.mtime_ns, reason))
    index.remove([number])
    index.save()

    assert "refused twice.jpg" not in make().stdout, "it still is, and was said before"
    assert names(output) == [first.name, locked.name, "product-00003.jpg"]
    first.unlink()
    make()
    assert names(output) == [locked.name, "product-00003.jpg", "twice.jpg"]


def test_near_duplicates_within_the_catalog_are_reported(
    make: Tool, tmp_path: Path
) -> None:
    write_products(tmp_path / "catalog", range(3))
    product(2).resize((200, 200)).save(tmp_path / "catalog" / "again.png")
    output = make().stdout
    assert "near-duplicates" in output
    assert "1 pairs of near-duplicates" in output
    assert "again.png and product-00002.jpg" in output


def test_a_low_threshold_makes_no_near_duplicates_of_what_is_told_apart(
    ready: Path,
) -> None:
    index = load_index(ready)
    promise = replace(index.about.promise, threshold=1e-9)
    index.about = replace(index.about, promise=promise)
    with workers() as pool:
        assert list(find_twins(index, index.first_vectors(), pool)) == []


def test_items_are_listed_and_removed(make: Tool, run_tool: Tool, tmp_path: Path) -> None:
    write_products(tmp_path / "catalog", range(3))
    make()
    index = tmp_path / "catalog.index"
    result = run_tool("pic-index", "--output", index, "--remove", "product-00001.jpg")
    assert "1 removed, 2 items left" in result.stdout
    listed = run_tool("pic-index", "--output", index, "--list").stdout
    assert [line.split()[1] for line in listed.splitlines()] == [
        "product-00000.jpg", "product-00002.jpg",
    ]  # fmt: skip
    odd = "Screenshot 1.00\u202fPM.jpg"
    shutil.copy(tmp_path / "catalog" / "product-00000.jpg", tmp_path / "catalog" / odd)
    (tmp_path / "catalog" / "product-00000.jpg").unlink()
    make()
    shown = run_tool("pic-index", "--output", index, "--list").stdout
    assert repr(odd) in shown
    removed = run_tool("pic-index", "--output", index, "--remove", repr(odd))
    assert "1 removed" in removed.stdout
    unknown = run_tool("pic-index", "--output", index, "--remove", "no.jpg")
    assert unknown.returncode == 2
    assert "holds no item 'no.jpg'" in unknown.stderr


def test_an_empty_catalog_is_refused(
    run_tool: Tool, tmp_path: Path, descriptor_file: Path
) -> None:
    (tmp_path / "catalog").mkdir()
    result = run_tool(
        "pic-index", "--catalog", tmp_path / "catalog", "--model", descriptor_file,
        "--output", tmp_path / "catalog.index",
    )  # fmt: skip
    assert result.returncode == 2
    assert "can be indexed: it holds none" in result.stderr
    assert not (tmp_path / "catalog.index").exists()


@pytest.fixture
def stop_at(
    tmp_path: Path, descriptor_file: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], list[str]]:
    """Run pic-index until it has so many items; returns those that it kept."""

    def stop(count: int) -> list[str]:
        save = CatalogIndex.save

        def save_and_stop(index: CatalogIndex, path: Path | None = None) -> None:
            save(index, path)
            if len(index.items) == count:
                raise KeyboardInterrupt

        monkeypatch.setattr(index_cli, "_SAVE_S", 0.0)
        monkeypatch.setattr(indexing, "SLICE", 2)
        monkeypatch.setattr(CatalogIndex, "save", save_and_stop)
        output = tmp_path / "catalog.index"
        command = ["--catalog", tmp_path / "catalog", "--model", descriptor_file,
                   "--output", output]  # fmt: skip
        stopped = CliRunner().invoke(index_cli.index, [*map(str, command)])
        assert "Aborted" in stopped.output
        return names(output.with_name(".catalog.index.partial"))

    return stop


def test_a_run_that_was_stopped_goes_on_with_what_it_had(
    make: Tool, tmp_path: Path, stop_at: Callable[[int], list[str]]
) -> None:
    paths = write_products(tmp_path / "catalog", range(5))
    Image.open(paths[0]).save(paths[1], quality=90)  # nearly the same
    partial = tmp_path / ".catalog.index.partial"
    assert len(stop_at(4)) == 4
    assert not (tmp_path / "catalog.index").exists()
    told = make().stdout
    assert "going on with 4 items" in told and "5 items; 1 added, 0 removed" in told
    assert f"near-duplicates {paths[0].name} and {paths[1].name}" in told
    assert not partial.exists()


def test_what_another_descriptor_had_come_to_is_not_gone_on_with(
    make: Tool, tmp_path: Path, stop_at: Callable[[int], list[str]]
) -> None:
    write_products(tmp_path / "catalog", range(5))
    stop_at(4)
    other = write_descriptor(tmp_path / "other.onnx", -1.0)
    told = make("--model", other).stdout
    assert "going on" not in told and "5 items; 5 added" in told
    made = load_index(tmp_path / "catalog.index")
    assert nearest(made, other, product(0)) == (
        "product-00000.jpg",
        pytest.approx(1, abs=0.02),
    )


def test_two_runs_on_one_index_are_kept_apart(
    make: Tool, run_tool: Tool, tmp_path: Path
) -> None:
    write_products(tmp_path / "catalog", range(2))
    make()
    output = tmp_path / "catalog.index"
    left = [
        tmp_path / f"{name}.7.tmp" for name in (".catalog.index", "..catalog.index.partial")
    ]
    other = tmp_path / ".catalog.index.new.7.tmp"  # of a run on another index
    for path in (*left, other):
        path.touch()
    held = lock(str(tmp_path / ".catalog.index.lock"))
    try:
        ways = (["--catalog", tmp_path / "catalog", "--model", tmp_path / "describe.onnx"],
                ["--remove", "product-00000.jpg"])  # fmt: skip
        for options in ways:
            refused = run_tool("pic-index", *options, "--output", output)
            assert refused.returncode == 2
            assert f"another pic-index is at work on {output}" in refused.stderr
        assert (
            "product-00000.jpg"
            in run_tool("pic-index", "--list", "--output", output).stdout
        )
        assert all(path.exists() for path in left), "they may be the other run's"
    finally:
        os.close(held)
    make()
    assert not any(path.exists() for path in left), "a killed one left them"
    assert other.exists()


def test_sigterm_ends_a_run_as_ctrl_c_does(tmp_path: Path, descriptor_file: Path) -> None:
    write_products(tmp_path / "catalog", range(3))
    script = (
        "import os, signal, sys\n"
        "from pic_daemon.catalog_index import CatalogIndex\n"
        "from pic_daemon.index_cli import index\n"
        "write = CatalogIndex._write\n"
        "def written(made, file):\n"
        "    write(made, file)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "if __name__ == '__main__':\n"
        "    CatalogIndex._write = written\n"
        "    index()\n"
    )
    command = [sys.executable, "-c", script, "--model", descriptor_file]
    command += ["--catalog", tmp_path / "catalog", "--output", tmp_path / "catalog.index"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.strip()) == (1, "Aborted!")
    assert not list(tmp_path.glob("*.index")) and not list(tmp_path.glob(".*.tmp"))


def test_a_picture_is_not_refused_for_what_an_item_was_before_a_stop(
    make: Tool, tmp_path: Path, stop_at: Callable[[int], list[str]]
) -> None:
    catalog = tmp_path / "catalog"
    (first,) = write_products(catalog, [0])
    shutil.copy(first, catalog / "z.jpg")
    assert "refused z.jpg: same bytes as product-00000.jpg" in make().stdout
    product(9).save(first)
    write_products(catalog, [1])
    stop_at(3)
    make()
    assert names(tmp_path / "catalog.index") == [
        "product-00000.jpg", "product-00001.jpg", "z.jpg",
    ]  # fmt: skip


def test_an_index_is_not_filled_from_quite_another_folder(
    make: Tool, run_tool: Tool, tmp_path: Path, descriptor_file: Path
) -> None:
    write_products(tmp_path / "catalog", range(3))
    write_products(tmp_path / "wrong", range(50, 53))
    make()
    kept = (tmp_path / "catalog.index").read_bytes()
    options = ("--model", descriptor_file, "--output", tmp_path / "catalog.index")
    refused = run_tool("pic-index", "--catalog", tmp_path / "wrong", *options)
    assert refused.returncode == 2
    assert f"is the index of {tmp_path / 'catalog'}, and " in refused.stderr
    assert (tmp_path / "catalog.index").read_bytes() == kept
    (tmp_path / "catalog").rename(tmp_path / "moved")
    for place in (tmp_path / "moved", tmp_path):  # and a level added to all names
        shutil.rmtree(tmp_path / "wrong", ignore_errors=True)
        again = run_tool("pic-index", "--catalog", place, *options)
        assert again.returncode == 0, again.stderr
    assert "3 renamed" in again.stdout


def test_items_in_a_folder_that_may_not_be_read_are_not_dropped(
    make: Tool, tmp_path: Path, descriptor_file: Path
) -> None:
    write_products(tmp_path / "catalog", range(2))
    write_products(tmp_path / "catalog" / "brand", range(10, 12))
    make()
    kept = (tmp_path / "catalog.index").read_bytes()
    brand = tmp_path / "catalog" / "brand"
    # Root may read everything, but for these two rights.
    bounds = "--bounding-set=-dac_override,-dac_read_search"
    under = ["setpriv", bounds, "--inh-caps=-all"] if os.geteuid() == 0 else []
    options = ["--model", descriptor_file, "--output", tmp_path / "catalog.index"]
    command = [*under, BIN / "pic-index", "--catalog", tmp_path / "catalog", *options]
    for mode in (0o444, 0):  # to be listed but not entered, and neither
        brand.chmod(mode)
        refused = subprocess.run([*map(str, command)], capture_output=True, text=True)
        assert refused.returncode == 2
        sentence = "brand cannot be read: Permission denied. 2 items of the index"
        assert sentence in refused.stderr
        anew = [*command, "--model", write_descriptor(tmp_path / "other.onnx", -1.0)]
        refused = subprocess.run([*map(str, anew)], capture_output=True, text=True)
        assert sentence in refused.stderr
    assert (tmp_path / "catalog.index").read_bytes() == kept
    (tmp_path / "catalog.index").unlink()
    told = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert "left out brand: cannot be read: Permission denied" in told.stdout
    assert len(names(tmp_path / "catalog.index")) == 2
    brand.chmod(0o700)
    assert "4 items; 2 added" in make().stdout


def test_a_rate_without_others_is_refused(
    run_tool: Tool, tmp_path: Path, descriptor_file: Path
) -> None:
    write_products(tmp_path / "catalog", range(2))
    result = run_tool(
        "pic-index", "--catalog", tmp_path / "catalog", "--model", descriptor_file,
        "--output", tmp_path / "catalog.index", "--target-fpr", 0.1,
    )  # fmt: skip
    assert result.returncode == 2 and "that --others names" in result.stderr


def test_decoys_alike_with_neighbouring_names_lie_in_one_half(ready: Path) -> None:
    pictures = [f"{number:04d}.jpg" for number in range(800) for _ in range(3)]
    scores = np.full(2400, 0.1)
    scores[3 * 740 : 3 * 760] = 0.9  # twenty shots of one scene
    promise = _promise(scores, pictures, 0.01, load_index(ready))
    assert promise.threshold < 0.9
    assert promise.rate and promise.rate.value == pytest.approx(20 / 384)


def test_a_rate_that_the_decoys_cannot_support_is_refused_at_once(
    run_tool: Tool, tmp_path: Path, descriptor_file: Path
) -> None:
    (tmp_path / "catalog").mkdir()  # nor is it looked into
    write_products(tmp_path / "others", range(100, 110))
    result = run_tool(
        "pic-index", "--catalog", tmp_path / "catalog", "--model", descriptor_file,
        "--output", tmp_path / "catalog.index", "--others", tmp_path / "others",
    )  # fmt: skip
    assert result.returncode == 2
    assert "15 decoy samples can promise a false positive rate of 0.2" in result.stderr


def test_copies_of_one_decoy_are_no_more_than_one(
    run_tool: Tool, tmp_path: Path, descriptor_file: Path
) -> None:
    write_products(tmp_path / "catalog", range(3))
    (decoy,) = write_products(tmp_path / "others", [100])
    for number in range(40):
        shutil.copy(decoy, decoy.with_name(f"copy-{number}.jpg"))
    result = run_tool(
        "pic-index", "--catalog", tmp_path / "catalog", "--model", descriptor_file,
        "--output", tmp_path / "catalog.index", "--others", tmp_path / "others",
        "--target-fpr", 0.1,
    )  # fmt: skip
    assert result.returncode == 2
    assert "holds 1 usable pictures (40 left out, as " in result.stderr
    assert ": same bytes as " in result.stderr


def test_a_decoy_longer_than_any_jpeg_is_measured_all_the_same(
    make: Tool, tmp_path: Path
) -> None:
    write_products(tmp_path / "catalog", range(3))
    write_products(tmp_path / "others", range(100, 112))
    product(113).resize((80_000, 300)).save(tmp_path / "others" / "scroll.png")
    output = make("--others", tmp_path / "others", "--target-fpr", 0.2).stdout
    assert "0 decoys left out" in output
    assert "note: the threshold is chosen on 7 decoys, 21 samples of them" in output


def test_names_that_are_not_utf8_are_printed(
    make: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    (first,) = write_products(tmp_path / "catalog", [1])
    odd = os.fsdecode(b"caf\xe9.jpg")
    first.rename(first.with_name(odd))
    shutil.copy(first.with_name(odd), first.with_name("d-copy.jpg"))
    assert "refused d-copy.jpg: same bytes as caf\\xe9.jpg" in make().stdout


def test_an_output_that_is_not_utf8_is_printed(
    run_tool: Tool, tmp_path: Path, descriptor_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    home = tmp_path / os.fsdecode(b"caf\xe9")
    write_products(home / "catalog", [1, 2])
    options = "--output", home / "catalog.index"
    made = run_tool("pic-index", *options, "--catalog", home / "catalog",
                    "--model", descriptor_file)  # fmt: skip
    assert (made.returncode, made.stderr) == (0, "")
    assert "caf\\xe9/catalog.index: 2 items" in made.stdout
    removed = run_tool("pic-index", *options, "--remove", "product-00001.jpg")
    assert removed.returncode == 0 and "still in" in removed.stdout


def test_an_exchanged_catalog_is_told_though_it_is_as_large(
    make: Tool, tmp_path: Path
) -> None:
    write_products(tmp_path / "others", range(100, 112))
    first, *_ = write_products(tmp_path / "catalog", range(4))
    make("--others", tmp_path / "others", "--target-fpr", 0.2)
    assert "measure again" not in make().stdout
    first.unlink()
    write_products(tmp_path / "catalog", [7])
    assert "4 items, now 4, not all of them the same" in make().stdout


def test_a_measured_threshold_is_not_lost_to_another_descriptor(
    make: Tool, run_tool: Tool, tmp_path: Path
) -> None:
    write_products(tmp_path / "others", range(100, 112))
    write_products(tmp_path / "catalog", range(4))
    measured = "--others", tmp_path / "others", "--target-fpr", 0.2
    make(*measured)
    kept = (tmp_path / "catalog.index").read_bytes()
    other = write_descriptor(tmp_path / "other.onnx", -1.0)
    anew = (
        "pic-index", "--catalog", tmp_path / "catalog", "--model", other,
        "--output", tmp_path / "catalog.index",
    )  # fmt: skip
    result = run_tool(*anew)
    assert result.returncode == 2
    assert "to which its threshold belongs: give --others" in result.stderr
    assert (tmp_path / "catalog.index").read_bytes() == kept
    assert "every item is made anew" in run_tool(*anew, *measured).stdout


def test_the_threshold_shuts_out_the_decoys_and_stays_when_items_are_added(
    make: Tool, tmp_path: Path
) -> None:
    write_products(tmp_path / "catalog", range(4))
    write_products(tmp_path / "others", range(100, 112))
    shutil.copy(tmp_path / "catalog" / "product-00000.jpg", tmp_path / "others")
    output = make("--others", tmp_path / "others", "--target-fpr", 0.2).stdout
    assert "same bytes as the catalog's product-00000.jpg" in output
    promise = load_index(tmp_path / "catalog.index").about.promise
    assert promise.target_fpr == 0.2
    assert promise.rate and promise.rate.value is not None
    assert promise.rate.value <= promise.rate.high <= 1
    assert 0 < promise.threshold < 1
    write_products(tmp_path / "catalog", [5])
    assert "measured with 4 items, now 5" in make().stdout
    assert load_index(tmp_path / "catalog.index").about.promise == promise


def test_an_index_cut_off_while_in_use_is_not_written_on(
    ready: Path, tmp_path: Path
) -> None:
    path = tmp_path / "catalog.index"
    shutil.copy(ready, path)
    index = load_index(path)
    os.truncate(path, 0)  # as `cp` does before it writes; a mapped file would end us here
    assert index.landmarks(next(iter(index.items))) == b""
    with pytest.raises(InputError, match="cut off while in use"):
        index.save()
    assert [file.name for file in tmp_path.iterdir()] == ["catalog.index"]


def rewritten(
    index: Path, folder: Path, member: str, change: Callable[[bytes], bytes]
) -> Path:
    """A copy of the archive with one member changed, its checksums right."""
    copy = folder / "changed.index"
    with zipfile.ZipFile(index) as old, zipfile.ZipFile(copy, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name == member else data)
    return copy


def test_damage_anywhere_in_the_file_is_noticed(ready: Path, tmp_path: Path) -> None:
    index = ready
    data = index.read_bytes()
    with zipfile.ZipFile(index) as archive:
        places = [info.header_offset + 200 for info in archive.infolist()]
    damaged = tmp_path / "damaged.index"
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 0xFF
        damaged.write_bytes(changed)
        with pytest.raises(InputError, match=r"is damaged \(.*remove it and make it again"):
            load_index(damaged)
    with zipfile.ZipFile(index) as archive:
        directory = range(archive.start_dir, len(data))
    for place in directory:  # some of it, such as times, does not matter
        for bit in (1, 8, 64):
            changed = bytearray(data)
            changed[place] ^= bit
            damaged.write_bytes(changed)
            with suppress(InputError):
                load_index(damaged)
    damaged.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="is no catalog index"):
        load_index(damaged)


def test_an_index_with_vectors_that_are_not_numbers_is_refused(
    ready: Path, tmp_path: Path
) -> None:
    index = ready
    ((_, stored),) = load_index(index).vectors.stored()
    nan = np.full(stored.shape[1], np.nan, np.float16).tobytes()
    changed = rewritten(
        index,
        tmp_path,
        "vectors.faiss",
        lambda data: data.replace(stored[0].tobytes(), nan),
    )
    with pytest.raises(InputError, match="it holds vectors that are not numbers"):
        load_index(changed)


def test_a_descriptor_that_gives_no_numbers_for_an_item_makes_no_index(
    run_tool: Tool, tmp_path: Path
) -> None:
    write_products(tmp_path / "catalog", [1])
    result = run_tool(
        "pic-index", "--catalog", tmp_path / "catalog", "--output", tmp_path / "new.index",
        "--model", write_descriptor(tmp_path / "blinded.onnx", blinded=140),
    )  # fmt: skip
    assert result.returncode == 2
    assert "gives vectors that are not numbers for 'product-00001.jpg'" in result.stderr
    assert not (tmp_path / "new.index").exists()


def test_a_decoy_that_the_descriptor_gives_no_numbers_for_matches_nothing(
    run_tool: Tool, tmp_path: Path
) -> None:
    write_products(tmp_path / "catalog", [1, 2])
    paths = write_products(tmp_path / "others", range(100, 108))
    for path in paths:
        white = Image.new("RGB", (256, 256), "white")
        Image.blend(Image.open(path), white, 0.8).save(path)
    result = run_tool(
        "pic-index", "--catalog", tmp_path / "catalog", "--output", tmp_path / "new.index",
        "--model", write_descriptor(tmp_path / "blinded.onnx", blinded=225),
        "--others", tmp_path / "others", "--target-fpr", 0.3,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "of 12 samples of others 0 matched" in result.stdout


def test_other_files_and_newer_versions_are_refused_in_one_sentence(
    ready: Path, tmp_path: Path
) -> None:
    index = ready
    with pytest.raises(InputError, match="No such file"):
        load_index(tmp_path / "none.index")
    with pytest.raises(InputError, match="is no catalog index"):
        load_index(ready.with_name("describe.onnx"))
    newer = rewritten(
        index, tmp_path, "about.json",
        lambda data: data.replace(b'"format_version": 2', b'"format_version": 9'),
    )  # fmt: skip
    with pytest.raises(InputError, match="has format version 9; this program reads 2"):
        load_index(newer)
    strange = rewritten(index, tmp_path, "landmarks.bin", lambda data: bytes(len(data)))
    with pytest.raises(InputError, match="its landmarks are those of another version"):
        load_index(strange)
    empty = rewritten(
        index, tmp_path, "items.json", lambda _: b'{"items": {}, "refused": []}'
    )
    with pytest.raises(InputError, match="is of an empty catalog"):
        load_index(empty)


def test_an_index_made_by_another_descriptor_is_refused_by_hash(
    ready: Path, tmp_path: Path
) -> None:
    other = load_descriptor(write_descriptor(tmp_path / "other.onnx", -1.0), "cpu")
    with pytest.raises(InputError, match="was made with another descriptor"):
        check_belongs(load_index(ready), other)


def test_what_changed_in_the_catalog_since_is_said(make: Tool, tmp_path: Path) -> None:
    catalog = tmp_path / "catalog"
    paths = write_products(catalog, range(4))
    Image.new("RGB", (99, 99)).save(catalog / "blank.png")
    make()
    index = load_index(tmp_path / "catalog.index")
    assert not index.changes()
    paths[0].write_bytes(paths[0].read_bytes())  # the same content, another time
    assert not index.changes()
    paths[1].unlink()
    product(77).save(paths[2])
    write_products(catalog, [9])
    assert str(index.changes()) == (
        "1 new ('product-00009.jpg'), 1 changed ('product-00002.jpg'), "
        "1 removed ('product-00001.jpg')"
    )
    shutil.rmtree(catalog)
    assert index.changes() is None
