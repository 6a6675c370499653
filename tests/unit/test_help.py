"""Every command teaches: its --help ends with examples, and each of them is one that its own parser takes."""

import argparse
import dataclasses
import re
import shlex
from collections.abc import Iterator

import pytest

from megasora.cli import VERBS, build_parser, check_command, parse_verb, verb_parser
from megasora.config import load_config
from megasora.errors import ConfigError
from megasora.keys import describe
from megasora.schema import Config
from megasora.verbs.launch_slurm import check, read_command
from tests.integration.conftest import ROOT


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and all below it."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from commands(below)


ALL = {parser.prog: parser for top in [build_parser(), *map(verb_parser, VERBS)] for parser in commands(top)}


def examples(parser: argparse.ArgumentParser) -> list[list[str]]:
    """The words of each, read off what --help prints."""
    _, heading, text = parser.format_help().partition("\nexamples:\n")
    assert heading, f"{parser.prog} --help has no examples"
    lines = text.replace("\\\n", " ").strip().splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def take(words: list[str]) -> None:
    """Parses a command as `megasora` would, its config and overrides too. Raises ConfigError."""
    if words[:2] == ["launch", "slurm"]:
        args = parse_verb(words)
        check(args)
        read_command(args)
    elif words[:2] == ["launch", "local"]:
        args = parse_verb(words)
        assert args.overrides == []
        check_command(args.command)
    else:
        args = parse_verb(words)
        if "config" in args and args.config is not None:
            load_config(args.config, args.overrides)
        elif args.overrides:
            raise ConfigError(f"{args.overrides[0]}: no such option")


def test_the_walk_finds_verbs_and_what_is_below_them() -> None:
    assert {"megasora train", "megasora ckpt average", "megasora launch slurm"} < set(ALL)
    assert len(ALL) == 1 + len(VERBS) + 6 + 2


@pytest.mark.parametrize("command", ALL)
def test_examples_are_there_and_are_taken(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = examples(ALL[command])
    assert found
    own = command.split()
    for words in found:
        assert words[0] == "megasora"
        take(words[1:])
    assert all(re.search(rf"\b{' '.join(own)}\b|\blaunch\b.* {own[-1]}\b", " ".join(words)) for words in found)


@pytest.mark.parametrize(
    "line",
    [
        "train --config configs/demo.yaml --run.stepz=3",
        "train --config configs/gone.yaml",
        "ckpt convert here",
        "ckpt ls runs/demo --verfy",
        "launch local --nproc 2 train --config configs/demo.yaml --optim.lrr=1",
        "launch slurm train --config configs/demo.yaml --nodez 2",
        "goodput runs/demo --html page.html",
    ],
)
def test_a_rotten_example_is_found(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError):
        take(line.split())


@pytest.mark.parametrize("section", [field.name for field in dataclasses.fields(Config)])
def test_a_key_is_shown_as_it_is_given(section: str) -> None:
    """What --help prints of it, given on the command line, changes nothing."""
    lines = "\n".join(describe(section))
    shown = [line for line in re.findall(r"^  (--\S+?=.*?)(?:  .*)?$", lines, re.M) if not line.endswith("=")]
    assert shown or section == "profile"
    assert load_config(None, shown) == Config()


def test_keys_are_explained_by_what_stands_beside_them() -> None:
    optim, parallel = "\n".join(describe("optim")), "\n".join(describe("parallel"))
    assert re.search(r"--optim.fused=torch +torch \| apex \| te; whose AdamW kernels: torch's own, apex's", optim)
    assert re.search(r"--parallel.memory=0.0 +GiB of a device that recompute=auto may fill; 0: all", parallel)
    assert re.search(r"^  parallel: How the processes share the work", parallel, re.M)
    assert re.search(r"--model.text_width=128 +of the text encoder's embeddings", "\n".join(describe("model")))
