from pathlib import Path
from typing import Any

import pytest

from pic_daemon.config import load_config, resolving
from pic_daemon.errors import InputError

WHOLE = "model = 'm'\ndatabase = 'd'\n[[watch]]\npath = 'drop'\n"


@pytest.fixture
def drop(tmp_path: Path) -> Path:
    (tmp_path / "drop").mkdir()
    return tmp_path / "drop"


def given(**overrides: Any) -> dict[str, Any]:
    return {"watch": (), "model": None, "database": None, **overrides}


def test_a_file_sets_every_key_and_the_command_line_wins(
    tmp_path: Path, drop: Path
) -> None:
    file = tmp_path / "pic.toml"
    file.write_text(
        'model = "m.onnx"\ndatabase = "log.db"\nbatch_size = 8\nsettle_seconds = 1\n'
        '[[watch]]\npath = "drop"\nrecursive = false\ninclude = ["*.png"]\n'
        'exclude = ["thumbs/"]\n'
    )
    config = load_config(file, given(batch_size=16))
    assert config.model == tmp_path / "m.onnx"
    assert config.batch_size == 16
    (folder,) = config.folders
    assert (folder.path, folder.recursive, folder.include) == (drop, False, ("*.png",))
    assert folder.exclude == ("thumbs",)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("modle = 'm'", "unknown key 'modle'"),
        (
            "model = 'm'\ndatabase = 'd'\n[[watch]]\npath = 'drop'\ncolour = 1",
            "unknown key 'colour'",
        ),
        ("batch_size = 'many'", "batch_size must be a whole number"),
        ("batch_size = 1.5", "batch_size must be a whole number"),
        ("batch_size = 0", "at least 1 and finite"),
        ("rescan_seconds = inf", "at most"),
        ("settle_seconds = nan", "at most"),
        ("hook_seconds = 1e300", "at most"),
        ("workers = 5000", "at most"),
        ("metrics = '127.0.0.1'", "metrics must be HOST:PORT"),
        ("metrics = '127.0.0.1:99999'", "metrics must be HOST:PORT"),
        ("metrics = 'http://127.0.0.1:9465'", "metrics must be HOST:PORT"),
        ("failed_folder = ''", "failed_folder must be a path"),
        ('database = "d\\u0000"', "database must be a path"),
        ("model = 'm'\ndatabase = 'd'\n[[watch]]\npath = ''", "needs a path"),
        (
            "model = 'm'\ndatabase = 'd'\n[[watch]]\npath = 'drop'\nsettle_seconds = 1",
            "belongs above",
        ),
        (
            "model = 'm'\ndatabase = 'd'\n[[watch]]\npath = 'drop'\nexclude = ['a/*']",
            "patterns are for names alone",
        ),
        (
            "model = 'm'\ndatabase = 'd'\n[[watch]]\npath = 'drop'\ninclude = ['jpg']",
            r'write "\*\.jpg"',
        ),
        (
            "model = 'm'\ndatabase = 'd'\n[[watch]]\npath = 'drop'\ninclude = ['.PNG']",
            r'write "\*\.png"',
        ),
        ("model = 'm'\ndatabase = 'd'\n[[watch]]\npath = \"a\\u0000\"", "a NUL in it"),
        ("batch_size = true", "batch_size must be a whole number"),
        ("settle_seconds = true", "settle_seconds must be a number"),
        ("provider = 'tpu'", "one of auto, cpu, cuda"),
        ("model = 5", "model must be a path"),
        ("webhook = 'example.org'", "must be an address"),
        ("webhook = 'file:///etc/passwd'", "must be an address"),
        ("webhook = 'https://host:http/'", "webhook: Port could not be cast"),
        ("webhook = 'https://two..dots/'", r"webhook: .*label empty"),
        ("webhook = 'https://me:secret@host/'", "password does not belong"),
        ("command = '/bin/tell'", "command must be a list"),
        ("command = []", "command must be a list"),
        ("command = ['tell']", "with its whole path"),
        ("keep_no_match_days = 0", "at least 1"),
        (
            "model = 'm'\ndatabase = 'd'\nwebhook = 'http://host/'\n"
            "webhook_header_file = 'h'\n[[watch]]\npath = 'drop'",
            "use https",
        ),
        (
            "model = 'm'\ndatabase = 'd'\nwebhook_header_file = 'h'\n"
            "[[watch]]\npath = 'drop'",
            "but no webhook",
        ),
        ("watch = 'drop'", r"\[\[watch\]\] table"),
        ("model = 'm'\ndatabase = 'd'\n[[watch]]\ninclude = ['*']", "needs a path"),
        ("model = 'm'\ndatabase = 'd'\n[[watch]]\npath = 'no'", "does not exist"),
        ("model = 'm'\ndatabase = 'd'\n[[watch]]\npath = 'drop'\ninclude = 'x'", "a list"),
        *(
            (f"{WHOLE}poll_seconds = {value}", "poll_seconds must be a number of at least")
            for value in ("0", "inf", "nan", "true", "'10'")
        ),
        (
            f"describe = 'v'\nindex = 'i'\ngate_threshold = 1.01\n{WHOLE}",
            "gate_threshold must be at most 1",
        ),
        ("model = ", "not valid TOML"),
        ("model = 'm'", "no database given"),
        ("model = 'm'\ndatabase = 'd'", "no folder to watch"),
    ],
)
def test_a_wrong_setting_is_named(
    tmp_path: Path, drop: Path, text: str, sentence: str
) -> None:
    file = tmp_path / "pic.toml"
    file.write_text(text)
    with pytest.raises(InputError, match=sentence):
        load_config(file, given())


@pytest.mark.parametrize("place", ["drop/log.db", "drop/deep/log.db"])
def test_the_database_may_not_lie_in_a_watch_folder(
    tmp_path: Path, drop: Path, place: str
) -> None:
    (drop / "deep").mkdir()
    with pytest.raises(InputError, match="lies in the watch folder"):
        load_config(None, given(watch=(drop,), model="m", database=tmp_path / place))


@pytest.mark.parametrize("place", ["drop", "drop/deep", "drop/none"])
def test_failed_files_may_not_go_into_a_watch_folder(
    tmp_path: Path, drop: Path, place: str
) -> None:
    (drop / "deep").mkdir()
    service = given(watch=(drop,), model="m", database=tmp_path / "log.db")
    with pytest.raises(InputError, match=r"the failed_folder .* lies in the watch folder"):
        load_config(None, {**service, "failed_folder": tmp_path / place})


def test_a_missing_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        load_config(tmp_path / "none.toml", given())


def test_links_are_resolved_as_far_as_they_can_be(tmp_path: Path) -> None:
    (tmp_path / "mnt" / "nas" / "drop").mkdir(parents=True)
    (tmp_path / "far").symlink_to(tmp_path / "mnt" / "nas")
    (tmp_path / "near").symlink_to("far/drop")
    paths = list(resolving(tmp_path / "near" / ".." / "drop" / "deep"))
    assert paths[-1] == (tmp_path / "near" / ".." / "drop" / "deep").resolve()
    # Known before anybody asks about what lies on the mount.
    into_mount = list(resolving(tmp_path / "near"))
    assert into_mount.index(tmp_path / "mnt" / "nas" / "drop") < len(into_mount) - 1
    (tmp_path / "round").symlink_to("round")
    assert len(list(resolving(tmp_path / "round"))) == 1000
    with pytest.raises(InputError, match="does not exist or is no folder"):
        load_config(None, given(watch=(tmp_path / "round",), model="m", database="d"))
