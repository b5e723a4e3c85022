"""What docs/operation.md says of messages, commands and settings is what there is."""

import ast
import re
from dataclasses import fields
from pathlib import Path

from pic_daemon.config import Config

SYSTEMS_WORDS = {
    "Address already in use", "Permission denied", "database is locked",
    "database or disk is full", "cannot open shared object file",
}  # fmt: skip
"""What the messages hand on from the system or from SQLite."""

PUT_TOGETHER = {  # by the programs, of what stands apart in them
    "-wal exists)", "in int8 the recall falls by",
    "MB left, too little for the processes that render samples",
}  # fmt: skip

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "operation.md").read_text()


def templates() -> str:
    """All text in the sources, with `...` for what is filled in."""
    found = []
    for file in [*ROOT.glob("daemon/**/*.py"), *ROOT.glob("training/**/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(part.value) if isinstance(part, ast.Constant) else
                                     "..." for part in node.values))  # fmt: skip
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[.\d]*[a-z]", "...", node.value))
    return "\n".join(found)


def test_every_message_explained_is_one_that_the_programs_print() -> None:
    _, tables = TEXT.split("## Messages, and what to do")
    rows = [line.split("|")[1] for line in tables.splitlines() if line.startswith("| ")]
    messages = [message for row in rows if "systemd:" not in row
                for message in re.findall(r"`([^`]{12,})`", row)]  # fmt: skip
    assert len(messages) > 40
    printed = templates()
    for message in messages:
        split = re.split(r"\.\.\.|\b\d+\b|: |; |=", message)
        parts = {part.strip(" '") for part in split} - SYSTEMS_WORDS - PUT_TOGETHER
        assert any(len(part) > 7 for part in parts), message
        assert all(part in printed for part in parts), (message, parts)


def test_every_setting_named_is_one_that_the_service_knows() -> None:
    known = {field.name for field in fields(Config)} | {"mode", "poll_seconds"}
    tuning = TEXT.split("## Tuning")[1].split("\n## ")[0]
    for cell in re.findall(r"^\| (`[^|]*) \|", tuning, re.MULTILINE):
        for name in re.findall(r"`(\w+)", cell):
            assert name in known, name
    assert {"webhook", "command", "keep_no_match_days"} <= set(re.findall(r"\w+", TEXT))
