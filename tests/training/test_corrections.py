import csv
import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from pictures import product, write_products
from shop import Shop
from small_run import options

from pic_daemon.corrections import Correction, Label, correct
from pic_training.sources import Sources, gather

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def dropped(tmp_path: Path) -> list[Path]:
    write_products(tmp_path / "catalog", range(5))
    write_products(tmp_path / "others", range(100, 120))
    return write_products(tmp_path / "drop", range(900, 920))


def said(path: Path, label: Label) -> Correction:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Correction(str(path), digest, label, "Ada", "2026-11-24T00:00:00.000Z")


def collect(
    home: Path, *corrections: Correction, others_val: Path | None = None
) -> Sources:
    folders = home / "catalog", home / "others", others_val
    return gather(*folders, home / "work.rgb", 64, corrections)


def names(sources: Sources, kind: str) -> set[str]:
    return {Path(p.path).name for p in sources.pictures if p.kind == kind}


def test_what_is_not_ours_joins_the_others_and_what_is_ours_the_catalog(
    dropped: list[Path], tmp_path: Path
) -> None:
    before = collect(tmp_path)
    sources = collect(
        tmp_path,
        *[said(path, "not-ours") for path in dropped[:15]],
        *[said(path, "ours") for path in dropped[15:]],
    )
    joined = names(sources, "other") - names(before, "other")
    assert joined == {path.name for path in dropped[:15]}
    assert names(sources, "catalog") - names(before, "catalog") == {
        path.name for path in dropped[15:]
    }
    train, val = (
        {Path(p.path).name for p in sources.of("other", split)}
        for split in ("train", "val")
    )
    assert joined & train and joined & val  # split as the others are
    assert not train & val


def test_what_is_not_ours_is_held_back_beside_a_folder_for_validation_too(
    dropped: list[Path], tmp_path: Path
) -> None:
    write_products(tmp_path / "val", range(300, 304))
    twins = [tmp_path / "drop" / f"twin-{number}.jpg" for number in range(100, 110)]
    for number, twin in enumerate(twins, 100):  # of one that is trained on
        product(number).save(twin, quality=50)
    judged = [said(path, "not-ours") for path in (*dropped, *twins)]
    sources = collect(tmp_path, *judged, others_val=tmp_path / "val")
    train, val = (
        {Path(p.path).name for p in sources.of("other", split)}
        for split in ("train", "val")
    )
    assert len(val) == 4 + 4 and len(val & {path.name for path in dropped}) == 4
    assert {twin.name for twin in twins} <= train


def test_what_is_held_back_stays_so_although_it_was_called_not_ours(
    dropped: list[Path], tmp_path: Path
) -> None:
    held_back = write_products(tmp_path / "val", range(300, 312))
    copies = [tmp_path / "drop" / f"copy-{n}.jpg" for n in range(6)]
    for copy, path in zip(copies, held_back, strict=False):
        copy.write_bytes(path.read_bytes())
    again = [tmp_path / "drop" / f"again-{n}.jpg" for n in range(306, 312)]
    for n, path in enumerate(again, 306):
        product(n).save(path, quality=50)
    judged = [said(path, "not-ours") for path in (*copies, *again)]
    sources = collect(tmp_path, *judged, others_val=tmp_path / "val")
    train, val = (
        {Path(p.path).name for p in sources.of("other", split)}
        for split in ("train", "val")
    )
    assert val == {path.name for path in (*held_back, *again)}
    assert train == names(collect(tmp_path), "other")


def test_a_file_that_is_gone_or_is_another_now_is_named_and_passed_over(
    dropped: list[Path], tmp_path: Path
) -> None:
    corrections = [said(path, "not-ours") for path in dropped[:3]]
    dropped[0].unlink()
    dropped[1].write_bytes(dropped[7].read_bytes())
    sources = collect(tmp_path, *corrections)
    reasons = {Path(item.path).name: item.reason for item in sources.left_out}
    assert reasons[dropped[0].name] == "no longer there"
    assert reasons[dropped[1].name] == "changed since it was corrected"
    assert dropped[2].name in names(sources, "other")
    assert not {dropped[0].name, dropped[1].name} & names(sources, "other")


def test_a_picture_of_the_catalog_called_not_ours_becomes_no_decoy(
    dropped: list[Path], tmp_path: Path
) -> None:
    item = tmp_path / "drop" / "copy.jpg"
    item.write_bytes((tmp_path / "catalog" / "product-00003.jpg").read_bytes())
    sources = collect(tmp_path, said(item, "not-ours"))
    (left_out,) = (i for i in sources.left_out if i.path == str(item))
    assert left_out.reason.startswith("same bytes as ")
    assert "copy.jpg" not in names(sources, "other")


def test_pic_train_uses_what_people_said_and_resumes_with_what_they_had_said(
    run_tool: Run, tmp_path: Path
) -> None:
    shop = Shop(tmp_path / "shop")
    write_products(tmp_path / "others", range(100, 130))
    alien, missed = shop.copy_of(700, "alien.jpg"), shop.stranger(701, "missed.jpg")
    changes = {"catalog": shop.catalog, "corrections": shop.database, "epochs": 1,
               "train-images": 64, "target-fpr": 0.1, "workers": 0}  # fmt: skip
    command = ["pic-train", *options(tmp_path, tmp_path / "run", **changes)]
    refused = run_tool(*command)
    assert refused.returncode == 2
    assert "nobody corrected a verdict" in refused.stderr
    assert not (tmp_path / "run").exists()

    correct(shop.database, 1, "ours", "Ada")
    correct(shop.database, 1, "not-ours", "Ada")
    correct(shop.database, 2, "ours", "Ada")
    trained = run_tool(*command)
    assert trained.returncode == 0, trained.stderr
    with (tmp_path / "run" / "manifest.csv").open() as file:
        kinds = {row["path"]: row["kind"] for row in csv.DictReader(file)}
    assert kinds[str(alien)] == "other"
    assert kinds[str(missed)] == "catalog"

    correct(shop.database, 2, "not-ours", "Grace")
    again = run_tool(*command, "--resume")
    assert again.returncode == 0, again.stderr
    # fp16 has to find the very same pictures again.
    model = tmp_path / "model.onnx"
    export = ["pic-export", tmp_path / "run", "--output", model, "--precision", "fp16"]
    exported = run_tool(*export, "--max-loss", 1)
    assert exported.returncode == 0, exported.stderr
