import os
from pathlib import Path

import pytest

from pic_daemon.cores import are_limited, cores, quota_of


@pytest.mark.parametrize(
    ("at", "quota", "expected"),
    [
        ("system.slice/pic-daemon.service", "200000 100000", 2),
        ("system.slice", "150000 100000", 2),  # of one above it, a part counts whole
        ("", "50000 100000", 1),  # a container's own
        ("system.slice/pic-daemon.service", "max 100000", None),
        ("system.slice/another.service", "100000 100000", None),
    ],
)
def test_a_quota_counts_as_cores(
    at: str, quota: str, expected: int | None, tmp_path: Path
) -> None:
    (tmp_path / at).mkdir(parents=True, exist_ok=True)
    (tmp_path / at / "cpu.max").write_text(f"{quota}\n")
    groups = "1:name=systemd:/elsewhere\n0::/system.slice/pic-daemon.service\n"
    assert quota_of(groups, tmp_path) == expected


def test_a_process_takes_no_more_cores_than_its_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pic_daemon.cores._GROUPS", tmp_path)
    assert 1 <= cores() <= (os.cpu_count() or 1)
    (tmp_path / "cpu.max").write_text("10000 100000\n")
    assert cores() == 1
    assert are_limited() == (os.cpu_count() != 1)


def test_the_least_of_several_quotas_counts(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "cpu.max").write_text("100000 100000\n")
    (tmp_path / "a" / "b" / "cpu.max").write_text("400000 100000\n")
    assert quota_of("0::/a/b\n", tmp_path) == 1


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert quota_of("", tmp_path / "missing") is None
