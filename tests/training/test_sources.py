import csv
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import mounted
from pictures import product, write_products
from PIL import Image

from pic_daemon.errors import InputError
from pic_daemon.images import decode, is_blank
from pic_training.run_folder import read_manifest, write_json, write_manifest
from pic_training.sources import Sources, gather, scratch_file


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    write_products(tmp_path / "catalog" / "deep", range(5))
    write_products(tmp_path / "others", range(100, 120))
    return tmp_path / "catalog", tmp_path / "others"


def collect(folders: tuple[Path, Path], val: Path | None = None) -> Sources:
    return gather(*folders, val, folders[0].parent / "work.rgb", 64)


def reasons(sources: Sources) -> dict[str, str]:
    return {Path(item.path).name: item.reason for item in sources.left_out}


def test_every_picture_is_decoded_once_into_the_working_file(
    folders: tuple[Path, Path],
) -> None:
    product(3).resize((512, 512)).save(folders[0] / "deep" / "product-00003.jpg")
    sources = collect(folders)
    assert len(sources.pictures) == 25
    data = np.memmap(sources.file, np.uint8, "r")
    picture = sources.of("catalog", "train")[3]
    assert (picture.width, picture.height, picture.stored_width) == (256, 256, 512)
    size = picture.width * picture.height * 3
    copy = data[picture.offset : picture.offset + size].reshape(256, 256, 3)
    drawn = np.asarray(product(3))
    assert np.abs(copy.astype(int) - drawn).mean() < 3


def test_near_duplicates_within_the_catalog_are_one_group(
    folders: tuple[Path, Path],
) -> None:
    product(3).save(folders[0] / "copy-of-3.jpg", quality=40)
    groups = [p.group for p in collect(folders).of("catalog", "train")]
    assert (len(groups), len(set(groups))) == (6, 5)


def test_a_file_larger_than_any_picture_is_left_out_unread(
    folders: tuple[Path, Path],
) -> None:
    with (folders[1] / "huge.tif").open("wb") as file:
        file.truncate(2 << 30)
    assert reasons(collect(folders))["huge.tif"] == "larger than 1,073,741,824 bytes"


def test_validation_decoys_are_never_trained_on(folders: tuple[Path, Path]) -> None:
    sources = collect(folders)
    train, val = (
        {p.sha256 for p in sources.of("other", split)} for split in ("train", "val")
    )
    assert (len(train), len(val)) == (16, 4)
    assert not train & val
    again = collect(folders)
    assert [p.split for p in again.pictures] == [p.split for p in sources.pictures]
    assert sources.of("catalog", "train") == sources.of("catalog", "val")


def test_a_folder_for_validation_is_used_whole_less_what_was_trained_on(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    write_products(tmp_path / "val", [119, 200, 201])  # 119 is among the others too
    sources = collect(folders, tmp_path / "val")
    assert len(sources.of("other", "train")) == 20
    assert len(sources.of("other", "val")) == 2
    assert reasons(sources)["product-00119.jpg"].startswith("same bytes as ")


def test_catalog_copies_among_the_others_are_named_and_left_out(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    product(2).resize((100, 100)).save(folders[1] / "copy.jpg", quality=30)
    product(3).save(folders[1] / "other-format.png")
    sources = collect(folders)
    assert set(reasons(sources)) == {"copy.jpg", "other-format.png"}
    assert reasons(sources)["copy.jpg"].endswith("catalog/deep/product-00002.jpg")
    write_manifest(sources, tmp_path)
    rows = list(csv.DictReader((tmp_path / "manifest.csv").open()))
    assert len(rows) == 25
    assert {row["kind"] for row in rows} == {"catalog", "other"}
    assert len(list(csv.DictReader((tmp_path / "left_out.csv").open()))) == 2


def test_near_duplicates_stay_on_one_side_of_the_split(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    for seed in range(100, 110):
        product(seed).save(folders[1] / f"again-{seed}.jpg", quality=50)
    sources = collect(folders)
    sides: dict[str, set[str]] = {}
    for picture in sources.pictures:
        if picture.kind == "other":
            sides.setdefault(picture.group, set()).add(picture.split)
    assert len(sides) == 20
    assert all(len(splits) == 1 for splits in sides.values())

    (tmp_path / "val").mkdir()
    product(105).resize((200, 200)).save(tmp_path / "val" / "leak.jpg")
    write_products(tmp_path / "val", [300])
    left_out = reasons(collect(folders, tmp_path / "val"))
    assert "near-duplicate of " in left_out["leak.jpg"]


def test_a_large_group_of_near_duplicates_is_not_held_back_for_its_size(
    folders: tuple[Path, Path],
) -> None:
    for number in range(40):
        product(100).save(folders[1] / f"again-{number}.jpg", quality=50 + number)
    sources = collect(folders)
    assert len(sources.of("other", "val")) <= 0.2 * 60
    # Nor are all the others, of which a fifth of the pictures could be made up.
    assert len({p.group for p in sources.of("other", "val")}) <= 0.2 * 20


def test_held_back_decoys_are_halved_by_group(folders: tuple[Path, Path]) -> None:
    sources = collect(folders)
    test = [
        p for p, tested in zip(sources.pictures, sources.tested(), strict=True) if tested
    ]
    assert {p.split for p in test} == {"val"}
    assert len(test) == 2


def test_near_duplicates_that_are_held_back_are_in_one_half_and_count_as_one(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    for seed in range(300, 308):
        write_products(tmp_path / "val", [seed])
        product(seed).save(tmp_path / "val" / f"again-{seed}.jpg", quality=50)
    sources = collect(folders, tmp_path / "val")
    tested, number = sources.tested(), sources.groups()
    halves: dict[int, set[bool]] = {}
    for place, picture in enumerate(sources.pictures):
        if picture.split == "val":
            halves.setdefault(int(number[place]), set()).add(bool(tested[place]))
    assert len(halves) == 8
    assert all(len(half) == 1 for half in halves.values())
    assert sum(half == {True} for half in halves.values()) == 4


def test_a_name_that_is_not_utf8_stops_nothing(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    os.rename(
        folders[0] / "deep" / "product-00000.jpg",
        os.path.join(os.fsencode(folders[0]), b"caf\xe9.jpg"),
    )
    sources = collect(folders)
    write_manifest(sources, tmp_path)
    write_json(tmp_path / "digest.json", {"sources": sources.digest})
    assert read_manifest(tmp_path) == {p.path: p.sha256 for p in sources.pictures}


def test_where_temporary_files_have_no_folder_another_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scratch_file() as file:
        file.touch()
    assert not file.parent.exists()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with (
        pytest.raises(InputError, match=r"No such file.*TMPDIR names another"),
        scratch_file(),
    ):
        pass


def test_folders_that_overlap_are_told_of(folders: tuple[Path, Path]) -> None:
    whole = folders[0].parent
    sources = gather(folders[0], whole, None, whole / "work.rgb", 64)
    catalog = {p.path for p in sources.pictures if p.kind == "catalog"}
    told = {item.path: item.reason for item in sources.left_out}
    assert set(told) == catalog
    assert set(told.values()) == {
        "it takes part already: the folders overlap, or it was corrected"
    }
    with pytest.raises(
        InputError, match=r"first .*: it takes part already: the folders overlap"
    ):
        gather(whole, folders[1], None, whole / "work.rgb", 64)


def test_a_uniform_picture_takes_no_part_of_either_kind(folders: tuple[Path, Path]) -> None:
    Image.new("RGB", (200, 200), "white").save(folders[0] / "white.png")
    Image.new("RGB", (200, 200), "grey").save(folders[1] / "grey.png")
    reason = "nearly uniform picture: nothing to recognise"
    assert reasons(collect(folders)) == {"white.png": reason, "grey.png": reason}


def test_a_pattern_so_fine_that_only_the_network_sees_it_takes_part(
    folders: tuple[Path, Path],
) -> None:
    stripes = np.full((256, 256, 3), 200, np.uint8)
    stripes[:, np.arange(256) % 8 < 4] = 180
    Image.fromarray(stripes).save(folders[0] / "stripes.png")
    pixels = decode((folders[0] / "stripes.png").read_bytes(), 64)
    assert not pixels.blank
    assert is_blank(np.asarray(Image.fromarray(stripes).resize((32, 32))))
    assert not reasons(collect(folders))


def test_an_unreadable_file_is_named_and_the_rest_used(folders: tuple[Path, Path]) -> None:
    (folders[0] / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing more")
    (folders[1] / "empty.png").touch()
    for name in ("a.heic", "b.HEIC", "README", "half.part", ".hidden.heic"):
        (folders[0] / name).touch()
    (folders[0] / "link.heic").symlink_to("a.heic")  # links are passed over as everywhere
    sources = collect(folders)
    assert len(sources.pictures) == 25
    assert set(reasons(sources)) == {"broken.jpg", "empty.png", "catalog"}
    names = "3 files are no images by their names: 2 .heic, 1 without an ending"
    assert reasons(sources)["catalog"] == names


@pytest.mark.parametrize("which", [0, 1])
def test_a_folder_without_a_usable_image_is_refused(
    folders: tuple[Path, Path], which: int, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    pair = [*folders]
    pair[which] = empty
    with pytest.raises(InputError, match="does not exist"):
        collect((pair[0], pair[1]))
    empty.mkdir()
    with pytest.raises(InputError, match="holds no image files"):
        collect((pair[0], pair[1]))
    (empty / "broken.jpg").write_text("text")
    with pytest.raises(
        InputError, match=r"none of the files .* can be used; left out: 1, first"
    ):
        collect((pair[0], pair[1]))
    (empty / "broken.jpg").rename(empty / "phone.HEIC")
    with pytest.raises(InputError, match=r"can be used; .* 1 files are no .*: 1 \.heic"):
        collect((pair[0], pair[1]))
    assert not list(folders[0].parent.glob("work.*"))


def test_the_digest_names_content_not_paths(folders: tuple[Path, Path]) -> None:
    before = collect(folders)
    (folders[0] / "deep" / "product-00000.jpg").rename(folders[0] / "renamed.jpg")
    assert collect(folders).digest_of("catalog") == before.digest_of("catalog")
    write_products(folders[0], [77])
    assert collect(folders).digest_of("catalog") != before.digest_of("catalog")


def test_a_full_disk_while_caching_is_said_and_leaves_nothing(
    tmp_path: Path, run_tool: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    write_products(tmp_path / "catalog", range(20))
    write_products(tmp_path / "others", range(100, 140))
    small = tmp_path / "small"
    small.mkdir()
    with mounted(Path("none"), small, "-t", "tmpfs", "-o", "size=1m"):
        folders = "--catalog", tmp_path / "catalog", "--others", tmp_path / "others"
        run = run_tool("pic-train", *folders, "--target-fpr", 0.05, "--out", small / "run")
        assert run.returncode == 2
        assert "No space left on device" in run.stderr
        assert "Traceback" not in run.stderr
        assert list(small.iterdir()) == []
