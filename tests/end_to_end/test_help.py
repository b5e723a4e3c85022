"""Every command's help shows how it is used, with words that it knows."""

import re
import shlex
from collections.abc import Iterator
from importlib.metadata import entry_points

import click
import pytest
from click.testing import CliRunner


def commands() -> Iterator[tuple[str, click.Command]]:
    """Our commands and those below them, each with the words that call it."""
    for entry in entry_points(group="console_scripts"):
        if entry.value.startswith(("pic_daemon.", "pic_training.")):
            pending = [(entry.name, entry.load())]
            while pending:
                name, command = pending.pop()
                yield name, command
                if isinstance(command, click.Group):
                    below = command.commands.items()
                    pending += [(f"{name} {word}", found) for word, found in below]


def examples(name: str, command: click.Command) -> list[list[str]]:
    """The words after `Example:` in the help, up to && or a comment."""
    text = CliRunner().invoke(command, ["--help"], prog_name=name).output
    found = re.findall(r"Example:\s+(.*?)(?:\n\n|\n\s*Options:|\Z)", text, re.DOTALL)
    return [shlex.split(example.split("&&")[0]) for example in found]


def known(words: list[str], by_name: dict[str, click.Command]) -> set[str]:
    """The options of the command that these words call."""
    name = " ".join(words[:2]) if " ".join(words[:2]) in by_name else words[0]
    command = by_name[name]
    if isinstance(command, click.Group):  # pic-matches, whose plain form is its list
        command = command.commands["list"]
    return {option for param in command.params for option in param.opts}


ALL = dict(commands())


def test_every_program_is_looked_at() -> None:
    programs = {name.split()[0] for name in ALL}
    assert programs >= {"pic-train", "pic-export", "pic-evaluate", "pic-daemon",
                        "pic-classify", "pic-matches"}  # fmt: skip
    assert {"pic-daemon run", "pic-matches backup"} <= set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_help_shows_an_example_that_the_command_understands(name: str) -> None:
    found = examples(name, ALL[name])
    assert found, f"{name} --help has no example"
    for words in found:
        assert words[0] == name.split()[0]
        if not isinstance(ALL[name], click.Group) and name != "pic-matches list":
            assert " ".join(words).startswith(name)
        given = {word for word in words if word.startswith("--")}
        assert given <= known(words, ALL), f"{name}: {given - known(words, ALL)}"
