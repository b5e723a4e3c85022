"""pic-evaluate on a model that knows one thing: how bright a picture is."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import write_descriptor, write_model
from pictures import product, write_products
from PIL import Image, ImageOps

from pic_daemon.cascade import Identifier
from pic_daemon.descriptor import load_descriptor
from pic_daemon.errors import InputError
from pic_daemon.identification import DEFAULT_THRESHOLD
from pic_daemon.images import decode
from pic_daemon.index_cli import open_or_empty
from pic_daemon.indexing import update, workers
from pic_daemon.model import load_model
from pic_training.edits import EDITS
from pic_training.evaluation import Hard
from pic_training.evaluation_run import _unseen
from pic_training.evaluation_scores import (
    AUGMENTED,
    OURS,
    Sample,
    Scored,
    Scorer,
    sample_file,
)
from pic_training.peers import nearest, peers
from pic_training.sources import Sources, digest_of, gather

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.name)
def test_every_edit_gives_a_picture_and_repeats_itself(edit) -> None:  # type: ignore[no-untyped-def]
    files = [edit.apply(product(1), np.random.default_rng(3)) for _ in "ab"]
    assert files[0] == files[1]
    assert files[0] != edit.apply(product(2), np.random.default_rng(3))


def edited(name: str, image: Image.Image) -> Image.Image:
    (edit,) = (edit for edit in EDITS if edit.name == name)
    return Image.open(io.BytesIO(edit.apply(image, np.random.default_rng(3))))


def apart(one: Image.Image, other: Image.Image) -> float:
    """Mean difference in levels."""
    pairs = [np.asarray(image.convert("RGB"), float) for image in (one, other)]
    return float(np.abs(pairs[0] - pairs[1]).mean())


def test_every_edit_does_what_its_name_says() -> None:
    whole = product(1)
    assert apart(edited("pristine", whole), whole) == 0
    losses = [apart(edited(f"JPEG quality {q}", whole), whole) for q in (80, 50, 20, 10)]
    assert 0 < losses[0] < losses[1] < losses[2] < losses[3]
    web = [edited(f"WebP quality {q}", whole) for q in (80, 30)]
    assert {file.format for file in web} == {"WEBP"}
    assert 0 < apart(web[0], whole) < apart(web[1], whole)
    for factor in (0.75, 0.5, 0.25):
        scaled = edited(f"scale {factor}", whole)
        assert scaled.size == (round(256 * factor),) * 2
        assert apart(scaled, whole.resize(scaled.size)) < 5
    for area in (0.9, 0.7, 0.5):
        cut = edited(f"crop to area {area}", whole)
        assert cut.width * cut.height == pytest.approx(area * 256**2, rel=0.02)
    assert edited("crop, scale, JPEG", whole).width < 256
    lopsided = whole.copy()
    lopsided.paste("navy", (0, 0, 80, 256))
    flipped = edited("flip", lopsided)
    assert apart(flipped, ImageOps.mirror(lopsided)) < 3 < apart(flipped, lopsided)
    for degrees in (2, 5):
        turned = edited(f"rotation {degrees} deg", whole)
        either = [whole.rotate(s * degrees, fillcolor="white") for s in (1, -1)]
        assert min(apart(turned, image) for image in either) < 3 < 2 * apart(turned, whole)
    for name, width in (("border 5%", 13), ("border 15%", 38)):
        framed = edited(name, whole)
        assert framed.size == (256 + 2 * width,) * 2
        assert apart(framed.crop((width, width, width + 256, width + 256)), whole) < 3
    screen = edited("screenshot frame", whole)
    assert apart(screen.crop((12, 37, 12 + 256, 37 + 256)), whole) < 3
    assert screen.size == (256 + 25, 256 + 75)
    for name, least in (("text overlay", 0.01), ("logo overlay", 0.02)):
        levels = np.abs(np.asarray(edited(name, whole), float) - np.asarray(whole))
        painted = (levels.max(axis=2) > 60).mean()
        assert least < painted < 0.2
    edges = {
        name: np.square(np.diff(np.asarray(edited(name, whole), float), axis=1)).mean()
        for name in ("pristine", "blur 1 px", "blur 2 px", "sharpen")
    }
    assert sorted(edges, key=edges.__getitem__) == [
        "blur 2 px", "blur 1 px", "pristine", "sharpen",
    ]  # fmt: skip
    red, _, blue = (np.asarray(c, float).mean() for c in whole.split())
    warm = [
        np.asarray(c, float).mean() for c in edited("colour filter warm", whole).split()
    ]
    assert warm[0] - warm[2] > red - blue + 10
    grey = np.asarray(edited("colour filter grey", whole))
    assert (grey == grey[..., :1]).all() and apart(Image.fromarray(grey), whole) > 3


def test_families_met_in_training_are_told_from_those_held_out() -> None:
    trained = {edit.family for edit in EDITS if edit.trained}
    held_out = {edit.family for edit in EDITS if not edit.trained}
    assert not trained & held_out
    assert {"JPEG quality", "scale", "crop to area"} <= trained
    assert {"flip", "rotation", "border", "screenshot frame", "WebP quality"} <= held_out


@pytest.mark.parametrize("peer", peers(), ids=lambda peer: peer.name)
def test_a_hash_finds_a_recompressed_copy_and_not_a_stranger(peer) -> None:  # type: ignore[no-untyped-def]
    catalog = [peer.hash(product(seed)) for seed in range(5)]
    copy = peer.hash(product(3).resize((200, 200)))
    stranger = peer.hash(ImageOps.flip(product(77)))
    (near, far), (named, _) = nearest([copy, stranger], catalog)
    assert near > 0.8 > far
    assert named == 3
    assert [found.tolist() for found in nearest([None], catalog)] == [[0.0], [-1]]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright catalog, dark decoys: the model below tells them apart by that alone.

    Descriptor and index are measured with it.
    """
    home = tmp_path_factory.mktemp("evaluation")
    write_products(home / "catalog", range(6))
    write_products(home / "others", range(100, 124))
    for path in (home / "catalog").iterdir():
        ImageOps.autocontrast(Image.open(path)).point(lambda v: 160 + v * 0.37).save(path)
    for path in (home / "others").iterdir():
        Image.open(path).point(lambda v: v * 0.3).save(path)
    Image.new("RGB", (64, 64), "white").save(home / "others" / "blank.png")
    (home / "others" / "product-00123.jpg").rename(home / "others" / "general.jpg")
    write_model(home / "model.onnx")
    descriptor = load_descriptor(write_descriptor(home / "describe.onnx"), "cpu")
    index = open_or_empty(home / "catalog.index", home / "catalog", descriptor)
    with workers() as pool:
        update(index, descriptor, pool, lambda _: None)
    index.save()
    subprocess.run(
        [Path(sys.executable).parent / "pic-evaluate", home / "model.onnx",
         "--catalog", home / "catalog", "--others", home / "others", "--general", "general",
         "--per-edit", "6", "--per-decoy", "10", "--published", "60",
         "--target-fpr", "0.03",
         "--describe", home / "describe.onnx", "--index", home / "catalog.index",
         "--output", home / "report"],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    return home / "report"


def test_a_model_that_can_tell_is_seen_to(report: Path) -> None:
    figures = json.loads((report / "evaluation.json").read_text())
    ours = figures["hard"]["model"]
    assert ours["trained"]["recall"]["value"] == 1
    assert ours["per_edit"]["pristine"]["recall"]["value"] == 1
    assert ours["overall"]["false_positive_rate"]["value"] <= 0.1
    assert set(ours["per_edit"]) == {edit.name for edit in EDITS}
    assert {"pHash", "dHash"} <= set(figures["hard"])


def test_the_cascade_is_measured_beside_it_and_names_the_items(report: Path) -> None:
    figures = json.loads((report / "evaluation.json").read_text())
    ours = figures["hard"]["cascade"]
    assert ours["trained"]["recall"]["value"] > 0.9
    assert ours["named"]["trained"] > 0.9
    assert ours["per_edit"]["border 15%"]["recall"]["value"] == 1
    assert ours["named"]["held_out"] >= figures["hard"]["pHash"]["named"]["held_out"]
    stored = figures["hard_at_own_threshold"]
    assert stored["cascade"]["threshold"] == DEFAULT_THRESHOLD
    assert stored["model"]["threshold"] == 0.5


def test_the_figures_say_what_was_asked(report: Path) -> None:
    home = report.parent
    figures = json.loads((report / "evaluation.json").read_text())
    asked = figures["asked"]
    assert asked["general"] == ["general"] and asked["runs"] == []
    for name, file in (("describe", "describe.onnx"), ("index", "catalog.index")):
        digest = hashlib.sha256((home / file).read_bytes()).hexdigest()
        assert asked[name] == {"path": str(home / file), "sha256": digest}
    assert asked["others"]["path"] == str(home / "others")
    assert {"onnxruntime", "pillow", "imagehash"} <= set(figures["versions"])


def test_a_near_duplicate_in_the_catalog_is_the_right_item_as_well(
    report: Path, tmp_path: Path
) -> None:
    home = report.parent
    write_products(tmp_path / "catalog", range(4))
    for seed in range(4):
        product(seed).save(tmp_path / "catalog" / f"again-{seed}.jpg", quality=50)
    sources = gather(tmp_path / "catalog", home / "others", None, tmp_path / "work.rgb", 64)
    descriptor = load_descriptor(home / "describe.onnx", "cpu")
    index = open_or_empty(tmp_path / "catalog.index", tmp_path / "catalog", descriptor)
    samples = [Sample(n, 0, 0) for n in range(8)]
    with workers() as pool:
        update(index, descriptor, pool, lambda _: None)
        model = load_model(home / "model.onnx", "cpu")
        identifier = Identifier(descriptor, index)
        scorer = Scorer(pool, model, identifier, sources, list(range(8)), 0, lambda _: None)
        named = scorer.score(samples).named
        # Asked for the ones with the others' items alone, none is its own.
        others = Scorer(pool, model, None, sources, [8, 9], 0, lambda _: None)
        assert not others.score(samples).named["pHash"].any()
    assert all(right.all() for right in named.values())


def test_general_pictures_are_measured_apart_and_blank_ones_not_at_all(
    report: Path,
) -> None:
    figures = json.loads((report / "evaluation.json").read_text())
    assert figures["counts"]["general pictures"] == 1
    assert figures["counts"]["files left out"] == 1
    look_alikes = [n for name, n in figures["counts"].items() if "look-alike pict" in name]
    assert sum(look_alikes) == 23
    assert figures["published"]["false_positive_rate"]["value"] == 0
    assert figures["published"]["recall"]["value"] == 1


def test_what_an_edit_leaves_blank_never_matches(report: Path, tmp_path: Path) -> None:
    home = report.parent
    # By brightness alone it is a sure match, with or without its mark.
    marked = Image.new("RGB", (128, 128), "white")
    marked.paste("black", (0, 0, 24, 24))
    (tmp_path / "others").mkdir()
    marked.save(tmp_path / "others" / "marked.png")
    write_products(tmp_path / "others", range(100, 110))
    folders = home / "catalog", tmp_path / "others"
    sources = gather(*folders, None, tmp_path / "work.rgb", 64)
    number = [Path(p.path).name for p in sources.pictures].index("marked.png")
    samples = [Sample(number, AUGMENTED, turn) for turn in range(30)]
    files = [sample_file(s, sources.pictures[number], sources.file, 0) for s in samples]
    blank = np.array([decode(file, 64).blank for file in files])
    with workers() as pool:
        model = load_model(home / "model.onnx", "cpu")
        scorer = Scorer(pool, model, None, sources, [0, 1], 0, lambda _: None)
        scores = scorer.score(samples).scores
    assert 0 < blank.sum() < 30
    assert (scores[OURS][blank] == 0).all() and (scores[OURS][~blank] > 0.5).all()


def test_the_processes_share_one_pytorch() -> None:
    # A module that cannot be imported there is passed over in silence.
    code = (
        "from pic_daemon.indexing import workers\n"
        "from pic_training.evaluation_scores import Scorer\n"
        "with workers(Scorer.__module__) as pool:\n"
        "    print(pool.submit(eval, \"'torch' in __import__('sys').modules\").result())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "True\n", result.stderr


def test_the_page_shows_curves_and_mistakes(report: Path) -> None:
    page = (report / "evaluation.html").read_text()
    assert page.count("data:image/png") == 2
    # Of 11 look-alikes that test and 6 pictures of the catalog the worst edit each.
    assert page.count("data:image/jpeg") == 17
    assert "copies of the pictures whose longer side is at most 256 pixels" in page
    assert "Shortcut checks" in page


def test_the_mistakes_are_those_of_the_cascade_and_say_what_was_taken_for_what(
    report: Path,
) -> None:
    page = (report / "evaluation.html").read_text()
    assert "Worst mistakes of the cascade" in page
    titles = re.findall(r'title="(.*?): ([\d.]+), nearest (.*?)"', page)
    assert len({name.split(",")[0] for name, _, _ in titles}) == len(titles) == 17
    for part in (titles[:11], titles[11:]):
        assert all(nearest.startswith("product-") for _, _, nearest in part)
    strangers, copies = (
        [float(score) for _, score, _ in t] for t in (titles[:11], titles[11:])
    )
    assert strangers == sorted(strangers, reverse=True)
    assert copies == sorted(copies)


def test_too_few_look_alikes_for_the_rate_are_refused(
    run_tool: Run, report: Path, tmp_path: Path
) -> None:
    home = report.parent
    result = run_tool(
        "pic-evaluate", home / "model.onnx", "--catalog", home / "catalog",
        "--others", home / "others", "--output", tmp_path / "report",
    )  # fmt: skip
    assert result.returncode == 2
    assert "decoy samples can promise a false positive rate" in result.stderr
    assert not (tmp_path / "report").exists()


def note_seen(run: Path, rows: list[tuple[Path, str, str]]) -> None:
    """Write of which pictures, with SHA-256 and kind, a run was made."""
    lines = [f"{path},{sha256},{kind},train\n" for path, sha256, kind in rows]
    (run / "manifest.csv").write_text("path,sha256,kind,split\n" + "".join(lines))
    digest = digest_of((sha256, kind, "train") for _, sha256, kind in rows)
    (run / "digest.json").write_text(json.dumps({"sources": digest}))


def test_near_duplicates_of_what_a_run_has_seen_are_left_out(
    run_tool: Run, report: Path, tmp_path: Path
) -> None:
    home, run = report.parent, tmp_path / "run"
    run.mkdir()
    seen = sorted((home / "others").glob("product*"))[:12]
    rows = [(p, hashlib.sha256(p.read_bytes()).hexdigest(), "other") for p in seen]
    rows.append((home / "others" / "general.jpg", "0" * 64, "other"))  # another by now
    note_seen(run, rows)
    others = tmp_path / "others"
    others.mkdir()
    for path in (home / "others").iterdir():  # other bytes of the same pictures
        Image.open(path).convert("RGB").save(others / path.with_suffix(".jpg").name)
    (others / "broken.jpg").write_text("not a picture")

    def decoys(*options: object) -> int:
        result = run_tool(
            "pic-evaluate", home / "model.onnx", "--catalog", home / "catalog",
            "--others", others, "--per-edit", 1, "--per-decoy", 10, "--published", 2,
            "--target-fpr", 0.06, "--output", tmp_path / "report", *options,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert f"left out {others / 'broken.jpg'}: not an image" in result.stderr
        counts = json.loads((tmp_path / "report" / "evaluation.json").read_text())["counts"]
        assert counts["files left out"] == 2
        notes.append(result.stderr)
        return sum(int(n) for name, n in counts.items() if "look-alike pictures" in name)

    notes: list[str] = []
    assert (decoys(), decoys("--run", run, "--run", run)) == (24, 12)
    assert "1 of the pictures" not in notes[0] and "1 of the pictures" in notes[1]


def test_the_whole_group_of_what_a_run_has_seen_is_left_out(
    report: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    others = tmp_path / "others"
    rows = []
    for seed in range(200, 230):
        write_products(tmp_path / "seen", [seed])
        path = tmp_path / "seen" / f"product-{seed:05d}.jpg"
        rows.append((path, hashlib.sha256(path.read_bytes()).hexdigest(), "other"))
        others.mkdir(exist_ok=True)
        for darker in (8, 16):  # the second is a copy of the first, rather than of the seen
            image = Image.open(path).point(lambda v, by=darker: max(0, v - by))
            image.save(others / f"{seed}-{darker}.png")
    write_products(others, [300])
    note_seen(tmp_path / "run", rows)
    catalog, work = report.parent / "catalog", tmp_path / "work.rgb"
    sources = gather(catalog, others, None, work, 64)
    kept = [p for p in _unseen(sources, tmp_path / "run", 64).pictures if p.kind == "other"]
    groups = {p.group for p in sources.pictures if p.kind == "other"}
    assert len(groups) < 61  # some of them are groups
    left = {Path(p.path).name for p in kept}
    assert not any(f"{s}-8.png" not in left and f"{s}-16.png" in left
                   for s in range(200, 230) if grouped(sources, s))  # fmt: skip
    (tmp_path / "run" / "manifest.csv").write_text("")
    with pytest.raises(InputError, match="names no picture"):
        _unseen(sources, tmp_path / "run", 64)
    note_seen(tmp_path / "run", rows)
    whole = (tmp_path / "run" / "manifest.csv").read_text()
    for end in (whole.rindex("\n", 0, -1) + 1, -20):  # of a row, and within one
        (tmp_path / "run" / "manifest.csv").write_text(whole[:end])
        with pytest.raises(InputError, match="cut off, or of another run"):
            _unseen(sources, tmp_path / "run", 64)


def grouped(sources: Sources, seed: int) -> bool:
    """Whether the two copies of a product are near-duplicates."""
    of = {Path(p.path).name: p.group for p in sources.pictures}
    return of[f"{seed}-8.png"] == of[f"{seed}-16.png"]


def test_a_name_that_is_not_utf8_can_be_among_the_mistakes(
    run_tool: Run, report: Path, tmp_path: Path
) -> None:
    home, others = report.parent, tmp_path / "others"
    shutil.copytree(home / "others", others)
    for n, path in enumerate(sorted(others.glob("product*"))):
        path.rename(os.path.join(others, os.fsdecode(b"caf\xe9-%d.jpg" % n)))
    model = os.path.join(tmp_path, os.fsdecode(b"mod\xe8le.onnx"))
    shutil.copy(home / "model.onnx", model)
    result = run_tool(
        "pic-evaluate", model, "--catalog", home / "catalog",
        "--others", others, "--per-edit", 1, "--per-decoy", 10, "--published", 2,
        "--target-fpr", 0.03, "--output", tmp_path / "report",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "caf\\xe9-" in (tmp_path / "report" / "evaluation.html").read_text()


def test_what_cannot_be_evaluated_is_refused_with_a_sentence(
    run_here: Run, report: Path, tmp_path: Path
) -> None:
    home = report.parent
    (tmp_path / "file").touch()
    write_products(tmp_path / "alone", [200])

    def refusal(**changes: object) -> str:
        given = {"catalog": home / "catalog", "others": home / "others",
                 "output": tmp_path / "report", **changes}  # fmt: skip
        options = [part for name, value in given.items() for part in (f"--{name}", value)]
        result = run_here("pic-evaluate", home / "model.onnx", *options)
        assert result.returncode == 2
        return result.stderr

    assert "cannot write" in refusal(output=tmp_path / "file", **{"target-fpr": 0.1})
    assert "no name among the others begins so" in refusal(general="generl")
    assert "no two look-alikes that differ" in refusal(general="product")
    assert "is left to use as a decoy" in refusal(others=tmp_path / "alone")
    assert "--gate-threshold goes with" in refusal(**{"gate-threshold": 0.5})
    cascade = {"describe": home / "describe.onnx", "index": home / "catalog.index"}
    foreign = refusal(**cascade, catalog=tmp_path / "alone")
    assert "catalog.index holds none of the catalog's pictures" in foreign


def test_a_cascade_can_be_given_another_gate_and_an_index_that_lacks_pictures(
    run_tool: Run, report: Path, tmp_path: Path
) -> None:
    home = report.parent
    shutil.copytree(home / "catalog", tmp_path / "catalog")
    write_products(tmp_path / "catalog", [50])
    result = run_tool(
        "pic-evaluate", home / "model.onnx", "--catalog", tmp_path / "catalog",
        "--others", home / "others", "--per-edit", 2, "--per-decoy", 10, "--published", 2,
        "--target-fpr", 0.03, "--output", tmp_path / "report", "--gate-threshold", 1,
        "--describe", home / "describe.onnx", "--index", home / "catalog.index",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "the index lacks 1 of 7 catalog pictures, whose copies" in result.stderr
    figures = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert figures["plan"]["gate_threshold"] == 1
    hard = figures["hard"]
    assert hard["cascade"]["trained"]["recall"]["value"] == 0
    assert hard["cascade, no gate"]["trained"]["recall"]["value"] > 0.5


def test_hashes_of_a_catalog_without_any_resemble_nothing() -> None:
    shares, places = nearest([np.zeros(8, np.uint8)], [None, None])
    assert (shares.tolist(), places.tolist()) == ([0.0], [-1])


def test_what_a_run_has_seen_is_left_out(
    run_here: Run, report: Path, tmp_path: Path
) -> None:
    home = report.parent
    (tmp_path / "run").mkdir()
    arguments = ["pic-evaluate", home / "model.onnx", "--catalog", home / "catalog",
                 "--others", home / "others", "--run", tmp_path / "run",
                 "--output", tmp_path / "report"]  # fmt: skip
    result = run_here(*arguments)
    assert result.returncode == 2 and "is not a run folder" in result.stderr
    seen = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (home / "others").iterdir()]
    # As the catalog too: what was called ours is seen as well.
    rows = [(Path("/gone"), seen[0], "catalog")]
    rows += [(Path("/gone") / sha256, sha256, "other") for sha256 in seen[1:]]
    note_seen(tmp_path / "run", rows)
    result = run_here(*arguments)
    assert result.returncode == 2 and "has seen every one of the others" in result.stderr


def test_the_threshold_is_chosen_on_one_half_and_every_figure_is_of_the_other() -> None:
    def scored(pictures: range, scores: list[float]) -> Scored:
        samples = [Sample(picture, 0, 0) for picture in pictures]
        return Scored(samples, {OURS: np.array(scores)}, {}, None)

    copies = scored(range(4), [0.9, 0.8, 0.55, 0.4])
    calibrating = scored(range(4, 14), [0.5, *[0.1] * 9])
    tested = scored(range(14, 24), [0.7, 0.6, *[0.1] * 8])
    found = Hard(copies, calibrating, tested, np.arange(24)).at_rate(OURS, 0.01)
    assert 0.5 < found.threshold < 0.6
    assert found.calibration_rate == 0
    assert found.overall.false_positive_rate.value == 0.2
    assert found.overall.recall.value == 0.75
