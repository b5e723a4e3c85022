"""pic-train as a user runs it, on a small scale."""

import csv
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BIN
from pictures import write_products
from small_run import EVERY_CORE, options

from pic_daemon.images import DecodedImage, Pixels
from pic_daemon.model import Model, Verdict, load_model
from pic_training.learner import Learner
from pic_training.report import doubt

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_a_run_folder_holds_everything_about_the_run(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "config.json", "digest.json", "manifest.csv", "left_out.csv", "metrics.csv",
        "metrics.json", "best.pt", "last.pt", "validation.npz", "parity.npy",
        "TrainingLossAccuracyPlot.png", "report.json",
    }  # fmt: skip
    epochs = list(csv.DictReader((finished / "metrics.csv").open()))
    assert [row["epoch"] for row in epochs] == ["1", "2"]
    assert len(json.loads((finished / "metrics.json").read_text())) == 2
    assert np.load(finished / "parity.npy").shape == (256, 64, 64, 3)
    config = json.loads((finished / "config.json").read_text())
    assert (config["arch"], config["naming"]) == ("resnet8", 1)


def test_the_report_adds_up_on_the_half_held_back_for_the_test(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    counts = [report[f"{kind}_{truth}"] for kind in ("true", "false")
              for truth in ("positive", "negative")]  # fmt: skip
    assert sum(counts) == report["accuracy"]["of"]
    assert 0 < sum(counts) < report["at_one_half"]["samples"] == 256
    assert report["accuracy"]["value"] == (counts[0] + counts[1]) / sum(counts)
    for name in ("accuracy", "recall", "false_positive_rate"):
        share = report[name]
        assert 0 <= share["low"] <= share["value"] <= share["high"] <= 1
    assert "false positive rate of at most 0.05 on" in report["threshold_rule"]
    assert "samples of 3 calibration decoys" in report["threshold_rule"]
    assert 0 <= report["calibration_error"]["after"] <= 1
    assert report["calibrated"]["accuracy"]["of"] == sum(counts)
    assert report["calibrated"]["loss"] > 0
    likest = report["likest_others"]
    scores = [other["score"] for other in likest]
    assert scores == sorted(scores, reverse=True)
    with (finished / "manifest.csv").open() as file:
        held_back = {r["path"] for r in csv.DictReader(file) if r["split"] == "val"
                     and r["kind"] == "other"}  # fmt: skip
    assert {other["path"] for other in likest} == held_back and len(likest) == 6
    assert doubt({**report, "threshold": 1.0}) is None
    above = doubt({**report, "threshold": scores[1]})
    assert above and likest[1]["path"] in above and likest[2]["path"] not in above
    assert report["images_per_second"] > 0
    assert report["wall_seconds"] > report["training_seconds"] > 0
    assert report["device"].startswith("cpu")
    assert report["versions"]["torch"] == torch.__version__.split("+")[0]


def test_the_threshold_is_chosen_among_scores_that_count_the_second_look(
    finished: Path, exported: Path, tmp_path: Path
) -> None:
    from pic_training.preparation import pictures_of, samples_of
    from pic_training.run_folder import load_network
    from pic_training.threshold import fit_calibration

    model = load_model(exported, "cpu")
    with np.load(finished / "validation.npz") as stored:
        whole, within = stored["scores"], stored["within"]
        labels = stored["labels"] > 0.5
    assert 0 < (whole == within).sum() < len(whole)
    assert (within > whole).any()
    report = json.loads((finished / "report.json").read_text())
    greater = np.maximum(whole, within).astype(float)
    config, _ = load_network(finished)
    samples = samples_of(
        config, pictures_of(config, finished, tmp_path / "sources.rgb"), "val"
    )
    fitted = ~samples.is_test()
    calibration = fit_calibration(greater[fitted], labels[fitted])
    assert report["temperature"] == pytest.approx(calibration.temperature)
    logits = calibration(greater[:256])
    images = np.load(finished / "parity.npy")
    assert model.info.looks_twice
    served = model.full_score(images).astype(float)
    assert np.abs(served - 1 / (1 + np.exp(-logits))).max() < 1e-4
    test = np.array([v.status == "match" for v in judged(model, images)])
    assert (test == (served >= report["threshold"])).all()


def judged(model: Model, images: Pixels) -> list[Verdict]:
    return model.judge([DecodedImage(pixels, 64, 64, "PNG") for pixels in images])


def test_a_run_finished_before_there_was_a_second_look_is_served_without_one(
    run_tool: Run, finished: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    report = json.loads((run / "report.json").read_text())
    del report["looks_twice"]
    (run / "report.json").write_text(json.dumps(report))
    with np.load(run / "validation.npz") as stored:
        values = {name: stored[name] for name in stored if name != "within"}
    np.savez(run / "validation.npz", **values)
    output = tmp_path / "model.onnx"
    result = run_tool("pic-export", run, "--output", output, "--precision", "int8",
                      "--max-loss", 1)  # fmt: skip
    assert result.returncode == 0, result.stderr
    model, images = load_model(output, "cpu"), np.load(run / "parity.npy")
    assert not model.info.looks_twice
    assert np.array_equal(model.full_score(images), model.score(images))


def test_a_run_stopped_by_ctrl_c_resumes_to_the_very_same_result(
    folders: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [str(BIN / "pic-train"), *options(folders, out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=EVERY_CORE)
    assert process.stdout
    for line in process.stdout:
        if line.startswith("epoch 1/2"):
            process.send_signal(signal.SIGINT)
            break
    process.communicate()
    assert process.returncode == 130
    progress = torch.load(out / "last.pt", weights_only=True)["progress"]
    assert (progress["epoch"], progress["batch"] > 0) == (1, True)

    again = [*command, "--resume"]
    subprocess.run(again, check=True, capture_output=True, env=EVERY_CORE)
    whole, parts = (
        torch.load(folder / "last.pt", weights_only=True)["network"]
        for folder in (finished, out)
    )
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    timed = {"seconds", "images_per_second", "val_seconds", "network_share"}
    whole, parts = (json.loads((f / "metrics.json").read_text()) for f in (finished, out))
    for alone, resumed in zip(whole, parts, strict=True):
        assert {key for key in alone if alone[key] != resumed[key]} <= timed


def test_a_finished_run_may_be_resumed_to_no_effect(
    finished: Path, folders: Path, run_tool: Run, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))

    def left() -> list[object]:
        report = json.loads((run / "report.json").read_text())
        with np.load(run / "validation.npz") as stored:
            arrays = [stored[name].tolist() for name in sorted(stored)]
        return [(run / "last.pt").read_bytes(), report["threshold"], arrays]

    before = left()
    result = run_tool("pic-train", *options(folders, run), "--resume")
    assert result.returncode == 0, result.stderr
    assert left() == before


@pytest.mark.parametrize(
    ("changes", "extra", "sentence"),
    [
        ({"catalog": "/nowhere"}, [], "'/nowhere' does not exist"),
        ({"others": "/nowhere"}, [], "'/nowhere' does not exist"),
        (
            {"arch": "resnet50", "weights": "/nowhere.pth"},
            [],
            "/nowhere.pth cannot be read",
        ),
        ({"weights": "imagenet"}, [], "no pretrained weights for the resnet8"),
        ({}, ["--resume"], "holds no run to resume"),
        ({"stages": 2}, [], "the resnet8 is trained as a whole"),
        ({"target-fpr": 0.001}, [], "decoy samples can promise"),
        ({"target-fpr": "nan"}, [], "not a finite number"),
        ({"naming": "inf"}, [], "not a finite number"),
        ({"task": "describe", "arch": "resnet8"}, [], "a resnet8 does not learn it"),
        ({"head-start": 16}, [], "a resnet8 has that with --naming 0"),
        ({"arch": "cnn", "stages": 0}, [], "the cnn is trained as a whole"),
        (
            {"arch": "resnet50", "weights": "none", "stages": 0, "naming": 1},
            [],
            "would teach nothing",
        ),
        ({"seed": 2**32}, [], "is not in the range"),
        ({"target-fpr": 1e-300}, [], "is not in the range"),
        (
            {"task": "describe", "head-start": 50, "dimensions": 400, "batch-size": 48},
            [],
            "a head start can give a cnn 384 at most",
        ),
    ],
)
def test_wrong_input_leaves_no_run_folder(
    run_here: Run, folders: Path, tmp_path: Path,
    changes: dict[str, object], extra: list[str], sentence: str,
) -> None:  # fmt: skip
    out = tmp_path / "run"
    result = run_here("pic-train", *options(folders, out, **changes), *extra)
    assert result.returncode == 2
    assert sentence in result.stderr
    assert not out.exists()


def test_a_run_folder_that_was_there_stays_where_a_run_is_refused(
    run_here: Run, folders: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir(mode=0o750)
    result = run_here("pic-train", *options(folders, out), "--target-fpr", 0.001)
    assert result.returncode == 2
    assert list(out.iterdir()) == [] and out.stat().st_mode & 0o777 == 0o750


def test_a_run_killed_while_its_pictures_were_read_is_begun_again(
    run_here: Run, folders: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "sources.tmp").write_bytes(b"half of the pictures")
    (out / "corrections.json.tmp").write_text("half of them")
    resumed = run_here("pic-train", *options(folders, out), "--resume")
    assert resumed.returncode == 2 and "begin it without --resume" in resumed.stderr
    begun = run_here("pic-train", *options(folders, out), "--target-fpr", 1e-9)
    assert "decoy samples can promise" in begun.stderr  # which is found once it has begun
    out.mkdir(exist_ok=True)
    (out / "sources.tmp").write_bytes(b"half of the pictures")
    (out / "notes.txt").write_text("mine")
    refused = run_here("pic-train", *options(folders, out))
    assert refused.returncode == 2 and "already holds other files" in refused.stderr


def test_weights_that_changed_before_the_first_epoch_are_not_gone_on_with(
    run_here: Run, folders: Path, finished: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    for name in ("last.pt", "best.pt"):
        (run / name).unlink()
    begun = json.loads((run / "digest.json").read_text())
    (run / "digest.json").write_text(json.dumps({**begun, "weights": "0" * 64}))
    result = run_here("pic-train", *options(folders, run), "--resume")
    assert result.returncode == 2 and "changed since" in result.stderr


def test_a_machine_without_room_for_samples_is_told_what_it_lacks(
    folders: Path, tmp_path: Path
) -> None:
    small = 'mount -t tmpfs -o size=256k none /dev/shm && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", small, "sh"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("a small /dev/shm needs root")
    command += [str(BIN / "pic-train"), *options(folders, tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "/dev/shm has 0 MB left" in result.stderr and "fewer --workers" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_run_folder_among_the_pictures_is_refused(run_here: Run, folders: Path) -> None:
    out = folders / "catalog" / "runs" / "first"
    result = run_here("pic-train", *options(folders, out))
    assert result.returncode == 2
    assert "choose a place outside" in result.stderr
    assert not out.parent.exists()


def test_a_run_folder_that_links_to_itself_is_refused(
    run_here: Run, folders: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "run")
    result = run_here("pic-train", *options(folders, tmp_path / "run"))
    assert result.returncode == 2
    assert result.stderr.startswith("Error: ")


def test_a_number_of_processes_that_torchrun_did_not_start_is_refused(
    run_here: Run, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run_here("pic-train", *options(folders, tmp_path / "run"))
    assert result.returncode == 2
    assert "WORLD_SIZE=2, but not RANK, MASTER_ADDR" in result.stderr


def test_another_run_is_never_overwritten(
    run_here: Run, folders: Path, finished: Path
) -> None:
    before = sorted((p.name, p.stat().st_mtime_ns) for p in finished.iterdir())
    fresh = run_here("pic-train", *options(folders, finished))
    assert fresh.returncode == 2 and "already holds another run" in fresh.stderr
    changed = run_here("pic-train", *options(folders, finished, seed=7), "--resume")
    assert changed.returncode == 2 and "seed = 0, not 7" in changed.stderr
    assert sorted((p.name, p.stat().st_mtime_ns) for p in finished.iterdir()) == before


def test_a_run_at_work_is_left_alone(
    run_tool: Run, run_here: Run, folders: Path, finished: Path, tmp_path: Path
) -> None:
    from pic_training.run_folder import held

    live = shutil.copytree(finished, tmp_path / "live")
    (live / "sources.rgb").write_bytes(b"read by the run at work")
    with held(live):
        fresh = run_here("pic-train", *options(folders, live))
        resumed = run_here("pic-train", *options(folders, live), "--resume")
    assert fresh.returncode == resumed.returncode == 2
    assert "already holds another run" in fresh.stderr
    assert "another pic-train is at work in" in resumed.stderr
    assert (live / "sources.rgb").exists()
    assert run_tool("pic-train", *options(folders, live), "--resume").returncode == 0


def test_a_folder_below_a_file_is_refused(
    run_here: Run, folders: Path, finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    trained = run_here("pic-train", *options(folders, tmp_path / "file" / "run"))
    below = tmp_path / "file" / "model.onnx"
    exported = run_here("pic-export", finished, "--output", below)
    for result, sentence in ((trained, "cannot make"), (exported, "cannot write")):
        assert result.returncode == 2
        assert sentence in result.stderr


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("best.pt", None),
        ("best.pt", 8192),  # of which PyTorch says something else
        ("report.json", None),
        ("parity.npy", None),
        ("last.pt", None),
        ("last.pt", 8192),
        ("validation.npz", None),
    ],
)
def test_a_damaged_run_folder_is_said_to_be(
    run_here: Run, folders: Path, finished: Path, tmp_path: Path, name: str, cut: int | None
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    whole = (run / name).read_bytes()
    (run / name).write_bytes(whole[: len(whole) // 2 if cut is None else cut])
    command = ["pic-export", run, "--output", tmp_path / "model.onnx"]
    if name in ("last.pt", "validation.npz"):
        command = ["pic-train", *options(folders, run), "--resume"]
    result = run_here(*command)
    assert result.returncode == 2
    assert name in result.stderr and "damaged" in result.stderr
    assert "Traceback" not in result.stderr


# Of another kind than the program writes, whether by hand or by another program.
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[]"),
        ("config.json", "{}"),
        ("report.json", "{}"),
        ("report.json", "[]"),
        ("parity.npy", np.zeros((1, 64, 64, 3), np.uint8)),
        ("parity.npy", np.zeros((256, 32, 32, 3), np.uint8)),
        ("best.pt", [1]),
        ("best.pt", {"network": 1}),
        ("best.pt", {"network": {"head.weight": 1}}),
        ("best.pt", {"network": {"head.weight": torch.zeros(1, 3)}}),
        ("best.pt", "hello"),
    ],
)
def test_what_no_run_wrote_is_not_exported(
    run_here: Run, finished: Path, tmp_path: Path, name: str, content: object
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    overwrite(run / name, content)
    result = run_here("pic-export", run, "--output", tmp_path / "model.onnx")
    assert result.returncode == 2
    assert name in result.stderr or "is not a run folder" in result.stderr
    assert not (tmp_path / "model.onnx").exists()


def test_nor_is_a_network_that_this_version_does_not_know(
    run_here: Run, finished: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    config = json.loads((run / "config.json").read_text()) | {"arch": "cubist"}
    (run / "config.json").write_text(json.dumps(config))
    result = run_here("pic-export", run, "--output", tmp_path / "model.onnx")
    assert result.returncode == 2 and "is not a run folder" in result.stderr


def test_a_threshold_that_is_no_score_is_not_exported(
    run_here: Run, finished: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    for false in (95, "high", None):
        report = json.loads((run / "report.json").read_text()) | {"threshold": false}
        (run / "report.json").write_text(json.dumps(report))
        result = run_here("pic-export", run, "--output", tmp_path / "model.onnx")
        assert result.returncode == 2 and "report.json is damaged" in result.stderr


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[]"),
        ("config.json", "{}"),
        ("config.json", '{"arch": "cubist"}'),
        ("digest.json", "{}"),
        ("digest.json", None),
        ("last.pt", [1]),
        ("last.pt", {"network": {}}),
        ("last.pt", "hello"),
        ("validation.npz", np.zeros(3)),
    ],
)
def test_nor_does_a_run_go_on_with_it(
    run_here: Run, folders: Path, finished: Path, tmp_path: Path, name: str, content: object
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    overwrite(run / name, content)
    result = run_here("pic-train", *options(folders, run), "--resume")
    assert result.returncode == 2 and name in result.stderr


def overwrite(path: Path, content: object) -> None:
    """Replace a file of a run folder; None removes it."""
    path.unlink()
    if isinstance(content, str):
        path.write_text(content)
    elif isinstance(content, np.ndarray):
        with path.open("wb") as file:
            np.save(file, content)
    elif content is not None:
        torch.save(content, path)


@pytest.mark.parametrize("given", ["", "auto", "0", "-1"])
def test_an_environment_that_is_not_torchruns_is_said_to_be(
    run_here: Run,
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: str,
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        with monkeypatch.context() as environment:
            environment.setenv(name, given)
            result = run_here("pic-train", *options(folders, tmp_path / "run"))
        assert result.returncode == 2
        assert f"{name}={given}, no such number: unset it" in result.stderr


def test_a_run_of_a_version_that_altered_otherwise_does_not_go_on(
    run_here: Run, folders: Path, finished: Path, tmp_path: Path
) -> None:
    older = shutil.copytree(finished, tmp_path / "older")
    config = json.loads((older / "config.json").read_text())
    del config["augmentation"]["variety"]
    (older / "config.json").write_text(json.dumps(config))
    result = run_here("pic-train", *options(folders, older), "--resume")
    assert result.returncode == 2
    assert "by a version that altered its samples otherwise" in result.stderr


def test_nor_does_one_whose_samples_a_gpu_cut_from_versions(
    run_here: Run, folders: Path, finished: Path, tmp_path: Path
) -> None:
    older = shutil.copytree(finished, tmp_path / "run")
    last = torch.load(older / "last.pt")
    last["progress"] |= {"versions": 16, "epoch": 0}
    torch.save(last, older / "last.pt")
    result = run_here("pic-train", *options(folders, older), "--resume")
    assert result.returncode == 2
    assert "by a version that altered its samples otherwise" in result.stderr


def test_a_finished_run_of_the_version_that_cropped_decoys_further_is_exported(
    run_tool: Run, finished: Path, tmp_path: Path
) -> None:
    older = shutil.copytree(finished, tmp_path / "older")
    config = json.loads((older / "config.json").read_text())
    config["augmentation"]["decoy_area"] = 0.1
    (older / "config.json").write_text(json.dumps(config))
    result = run_tool("pic-export", str(older), "--output", str(tmp_path / "model.onnx"))
    assert result.returncode == 0, result.stderr


def test_a_run_begun_before_there_was_an_option_goes_on(
    run_tool: Run, folders: Path, tmp_path: Path
) -> None:
    older = tmp_path / "older"
    given = options(folders, older, epochs=1)
    begun = {"arch": "cnn", "naming": 0, "lr": 0.02}  # by default, then
    options_then = options(folders, older, epochs=1, **begun)
    assert run_tool("pic-train", *options_then).returncode == 0
    config = json.loads((older / "config.json").read_text())
    del config["naming"], config["least_area"]
    (older / "config.json").write_text(json.dumps(config))
    result = run_tool("pic-train", *given, "--resume")
    assert result.returncode == 0, result.stderr
    result = run_tool("pic-train", *given, "--naming", 1, "--resume")
    assert result.returncode == 2 and "naming = 0.0, not 1" in result.stderr


def test_without_the_train_extra_it_says_what_to_install(
    folders: Path, tmp_path: Path
) -> None:
    code = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name: None if name == 'torch' else find(name)\n"
        "from pic_training.cli import train; train()"
    )
    command = [sys.executable, "-c", code, *options(folders, tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "training needs torch" in result.stderr


@pytest.mark.parametrize(("samples", "said"), [(192, True), (2000, False)])
def test_a_run_that_shows_the_catalog_too_rarely_says_so(
    run_here: Run, folders: Path, tmp_path: Path, samples: int, said: bool
) -> None:
    changes = {"train-images": samples, "target-fpr": 1e-6}  # ends before training
    result = run_here("pic-train", *options(folders, tmp_path / "run", **changes))
    assert "can promise a false positive rate" in result.stderr
    assert ("shows each catalog image only some" in result.stderr) == said
    assert not said or "some 32 times" in result.stderr


def test_an_unreadable_image_is_named_and_counted(
    run_tool: Run, folders: Path, tmp_path: Path
) -> None:
    write_products(tmp_path / "catalog", range(3))
    (tmp_path / "catalog" / "broken.jpg").write_text("not a picture")
    changes = {"catalog": tmp_path / "catalog", "epochs": 1, "train-images": 32}
    result = run_tool("pic-train", *options(folders, tmp_path / "run", **changes))
    assert result.returncode == 0, result.stderr
    assert f"left out {tmp_path / 'catalog' / 'broken.jpg'}: not an image" in result.stderr
    assert "1 files left out" in result.stdout


def test_a_catalog_of_one_image_and_few_others_still_gives_a_report(
    run_tool: Run, tmp_path: Path
) -> None:
    write_products(tmp_path / "catalog", [0])
    write_products(tmp_path / "others", range(100, 110))
    run = options(tmp_path, tmp_path / "run", **{"epochs": 1, "train-images": 32})
    result = run_tool("pic-train", *run)
    assert result.returncode == 0, result.stderr
    assert "recall" in result.stdout
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    recall = report["recall"]  # of one picture, which says nothing of another
    assert (recall["low"], recall["high"]) == (0, 1)


def test_others_too_few_to_test_on_are_refused_before_training(
    run_here: Run, tmp_path: Path
) -> None:
    write_products(tmp_path / "catalog", range(3))
    write_products(tmp_path / "others", range(100, 103))
    result = run_here("pic-train", *options(tmp_path, tmp_path / "run"))
    assert result.returncode == 2
    assert "add others" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_learning_rate_that_explodes_ends_with_a_sentence(
    run_tool: Run, folders: Path, tmp_path: Path
) -> None:
    result = run_tool("pic-train", *options(folders, tmp_path / "run", lr=1e12))
    assert result.returncode == 2
    assert "start again with a smaller --lr" in result.stderr
    assert not (tmp_path / "run" / "sources.rgb").exists()


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_step_that_does_not_fit_into_memory_ends_with_a_sentence(
    run_here: Run,
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    on_gpu: bool,
) -> None:
    def too_large(*_: object) -> None:
        if on_gpu:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(Learner, "step", too_large)
    result = run_here("pic-train", *options(folders, tmp_path / "run"))
    assert result.returncode == 2
    assert "does not hold what a step of 64 images needs" in result.stderr


def test_a_validation_loss_that_is_no_number_keeps_no_checkpoint(
    run_tool: Run, folders: Path, tmp_path: Path
) -> None:
    # One step: the loss of its batch is taken before the step that ruins the network.
    changes = {"lr": 1e38, "train-images": 32}
    result = run_tool("pic-train", *options(folders, tmp_path / "run", **changes))
    assert result.returncode == 2
    assert "start again with a smaller --lr" in result.stderr
    assert not list((tmp_path / "run").glob("*.pt"))


def test_an_error_that_nobody_foresaw_ends_the_run(folders: Path, tmp_path: Path) -> None:
    """Workers ignore what multiprocessing ends them by, and would be waited for."""
    script = (
        "from pic_training.cli import train\n"
        "from pic_training.learner import Learner\n"
        "def step(*_): raise RuntimeError('an illegal memory access')\n"
        "Learner.step = step\n"
        "train()\n"
    )
    command = [sys.executable, "-c", script, *options(folders, tmp_path / "run", workers=2)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    assert ended.stderr.rstrip().endswith("RuntimeError: an illegal memory access")
