"""What --help says of a config's keys: defaults, what may be chosen, and what is written beside fields and under classes."""

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any

import yaml

from megasora.schema import Config

COLUMN = 38  # where explanations begin
WIDTH = 120


def describe(section: str) -> Iterator[str]:
    """Lines for a section or a key of the top level. Of a list of sections (stages) the first stands for all."""
    value, owner = getattr(Config(), section), Config
    if isinstance(value, tuple):
        value, section = value[0], f"{section}.0"
    if not dataclasses.is_dataclass(value):
        yield from _line(section, value, owner, section)
        return
    yield from _keys(section, value)


def _keys(prefix: str, value: Any) -> Iterator[str]:
    yield ""
    about = " ".join(str(inspect.getdoc(type(value))).split())
    yield from textwrap.wrap(f"{prefix}: {about}", WIDTH, initial_indent="  ", subsequent_indent="  ")
    for field in dataclasses.fields(value):
        inner, key = getattr(value, field.name), f"{prefix}.{field.name}"
        if dataclasses.is_dataclass(inner):
            yield from _keys(key, inner)
        else:
            yield from _line(key, inner, type(value), field.name)


def _line(key: str, value: Any, owner: type, field: str) -> Iterator[str]:
    said = "; ".join(filter(None, (_choices(owner, field), _comments(owner).get(field, ""))))
    begin = f"  --{key}={_written(value)}"
    if not said:
        yield begin
        return
    lines = textwrap.wrap(said, WIDTH - COLUMN, break_long_words=False, break_on_hyphens=False)
    first = [] if len(begin) > COLUMN - 2 else [begin.ljust(COLUMN) + lines.pop(0)]
    yield from first or [begin]
    yield from (" " * COLUMN + line for line in lines)


def _written(value: Any) -> str:
    """As it is given on the command line."""
    if value is None or isinstance(value, str):
        return value or ""
    plain = dict(value) if isinstance(value, dict) else [*value] if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


def _choices(owner: type, field: str) -> str:
    kind = typing.get_type_hints(owner)[field]
    return " | ".join(map(str, typing.get_args(kind))) if typing.get_origin(kind) is typing.Literal else ""


@cache
def _comments(owner: type) -> dict[str, str]:
    """By field, the comments on its lines, of a dataclass and of those that it extends."""
    found: dict[str, str] = {}
    for base in reversed(owner.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        source = textwrap.dedent(inspect.getsource(base))
        comments = {
            token.start[0]: token.string.lstrip("# ")
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT and not token.string.startswith("# fmt:")
        }
        (body,) = ast.parse(source).body
        assert isinstance(body, ast.ClassDef)
        for node in body.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                said = " ".join(comments[line] for line in lines if line in comments)
                found[node.target.id] = said or found.get(node.target.id, "")
    return found
