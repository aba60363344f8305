"""From YAML files and dotted flags to a configuration dataclass, with one clear line for every mistake.

jsonargparse parses, checks types and prints (`--print_config`). Added here: unknown keys of a YAML file are found
before anything is parsed (jsonargparse passes over a section that is not a mapping), with the nearest key there is; its
several-line messages become one; and each option's help is the docstring under its field. Imports nothing heavy.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import re
import textwrap
import types
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace  # type: ignore[attr-defined]

from curate.errors import ConfigError, did_you_mean

Config = TypeVar("Config")
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    type(None): "null",
}


# --- building a parser -----------------------------------------------------------------------------------------------


class _Formatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line breaks of a description, so that its example can be copied."""


def new_parser(description: str, usage: str | None = None) -> ArgumentParser:
    """A parser that raises its errors, and takes no abbreviated keys: a typo should not become a choice."""
    return ArgumentParser(
        description=textwrap.dedent(description).strip(),
        usage=usage,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=_Formatter,
    )


def add_config(parser: ArgumentParser, config: type) -> None:
    """Add `--config FILE` and a flag for each key of a configuration dataclass, its docstring as help."""
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; flags after it override it.")
    parser.add_class_arguments(config)
    documented = dict(_documented(config))
    for action in parser._actions:
        if action.dest in documented:
            action.help = documented[action.dest].replace("%", "%%") or argparse.SUPPRESS
    for group in parser._action_groups:
        if group.title and group.title.startswith("<class") and group._group_actions:
            group.title = group._group_actions[-1].dest.rpartition(".")[0] or "run"


def _documented(config: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, docstring) of every field; a section's is empty: it is shown by its keys.

    Not that of a section that may be null: jsonargparse prints no configuration of an option without help.
    """
    docs = _field_docs(config)
    for name, hint in get_type_hints(config).items():
        key = f"{prefix}.{name}" if prefix else name
        section = section_of(hint)
        yield key, "" if is_dataclass(hint) else docs.get(name, "")
        if section:
            yield from _documented(section, key)


def section_of(hint: Any) -> type | None:
    """The dataclass that a type is, or is beside null; None for anything else."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((part for part in parts if isinstance(part, type) and is_dataclass(part)), None)


def _field_docs(config: type) -> dict[str, str]:
    """Docstrings under the fields of a dataclass and its bases."""
    docs: dict[str, str] = {}
    for owner in reversed([kind for kind in config.__mro__ if is_dataclass(kind)]):
        docs |= _own_field_docs(owner)
    return docs


def _own_field_docs(config: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0].body  # type: ignore[attr-defined]
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


# --- parsing ---------------------------------------------------------------------------------------------------------


def parse(parser: ArgumentParser, arguments: Sequence[str], configs: dict[str, type]) -> Namespace:
    """Parse a command line and make its dataclasses.

    Args:
        parser: with subcommands.
        arguments: the words after the program's name.
        configs: by subcommand, the dataclass its `--config` files and flags are of.

    Raises:
        ConfigError: one line: the key or file, what was expected, the nearest known key.
    """
    config = configs.get(arguments[0]) if arguments else None
    if config:
        arguments = _spelled_out(arguments, config)
        for path in _config_files(arguments):
            check_keys(path, config)
    try:
        return parser.instantiate(parser.parse_args(list(arguments)))
    except argparse.ArgumentError as error:
        raise ConfigError(_one_line(str(error), config)) from error


def _spelled_out(arguments: Sequence[str], config: type) -> list[str]:
    """Flags with hyphens as keys with underscores, and a true-or-false flag without a value as true."""
    switches = {f"--{key}" for key, _ in _documented(config) if _hint_of(config, key) is bool}
    words = []
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            flag = "--" + flag[2:].replace("-", "_")
        alone = flag in switches and not equals and following.lower() not in ("true", "false")
        words.append(f"{flag}=true" if alone else flag + equals + value)
    return words


def read_config(path: Path, config: type[Config]) -> Config:
    """Read a YAML file into a configuration dataclass.

    Raises:
        ConfigError: as `parse`.
    """
    check_keys(path, config)
    parser = new_parser("")
    add_config(parser, config)
    try:
        read = parser.instantiate(parser.parse_args(["--config", str(path)]))
    except argparse.ArgumentError as error:
        raise ConfigError(f"{path}: {_one_line(str(error), config)}") from error
    return as_config(read, config)


def as_config(read: Namespace, config: type[Config]) -> Config:
    """The part of a parsed command line that a configuration dataclass holds."""
    return config(**{field.name: read[field.name] for field in fields(config)})  # type: ignore[arg-type]


def _config_files(arguments: Sequence[str]) -> Iterator[Path]:
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if word == "--config" and following:
            yield Path(following)
        elif word.startswith("--config="):
            yield Path(word.removeprefix("--config="))


# --- unknown keys ----------------------------------------------------------------------------------------------------


def check_keys(path: Path, config: type) -> None:
    """Check that a YAML file has only keys that a configuration dataclass has.

    Raises:
        ConfigError: no such file, not YAML, an unknown key; names the line or the nearest key.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(f"--config {path}: cannot be read ({reason})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"{path}: {line}not YAML ({getattr(error, 'problem', error)})") from error
    if content is not None:
        _check(content, config, "", str(path), config)


def _check(value: Any, hint: Any, key: str, path: str, top: type) -> None:
    """Walk a YAML value along the type it should have."""
    if get_origin(hint) is dict and isinstance(value, dict):
        for name, item in value.items():
            _check(item, get_args(hint)[1], f"{key}.{name}", path, top)
    hint = section_of(hint)
    if hint is None or (value is None and key):
        return
    if not isinstance(value, dict):
        known = ", ".join(get_type_hints(hint))
        raise ConfigError(f"{path}: {key or 'the file'}: expected keys ({known}), got {value!r}")
    hints = get_type_hints(hint)
    for name, item in value.items():
        inner = f"{key}.{name}" if key else str(name)
        if name not in hints:
            raise ConfigError(f"{path}: no key '{inner}'.{nearest(inner, top, [*hints])}")
        _check(item, hints[name], inner, path, top)


def nearest(key: str, config: type, siblings: Sequence[str] = ()) -> str:
    """` Did you mean …?` with what the key looks like, or where a key of that name is; else the keys beside it."""
    leaf = key.rpartition(".")[2]
    known = [name for name, _ in _documented(config)]
    beside = difflib.get_close_matches(leaf, siblings, n=1)
    elsewhere = [name for name in known if name.rpartition(".")[2] == leaf]
    alike = difflib.get_close_matches(key, known, n=1)
    found = [key.removesuffix(leaf) + name for name in beside] + elsewhere + alike
    return f" Did you mean '{found[0]}'?" if found else did_you_mean(leaf, siblings)


# --- jsonargparse's messages in one line -----------------------------------------------------------------------------


def _one_line(message: str, config: type | None) -> str:
    """What jsonargparse says over several lines, as: key: expected …, got …."""
    unknown = re.search(r"unrecognized arguments: --([\w.]+)|does not accept option '([^']+)'", message)
    if config and unknown:
        key = unknown[1] or unknown[2]
        return f"no key '{key}'.{nearest(key, config)}"
    if inner := re.search(r'Parser key "([^"]+)":.*Option \'(\w+)\' is not accepted', message, re.DOTALL):
        return f"{inner[1]}: no key '{inner[2]}'.{did_you_mean(inner[2], _item_keys(config, inner[1]))}"
    value = re.search(r'Parser key "([^"]+)":.*(?:Got|Given) value: ([^\n]*)', message, re.DOTALL)
    if value and config:
        return f"{value[1]}: expected {_expected(config, value[1])}, got {value[2]!r}"
    if command := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
        return f"no command '{command[1]}'.{did_you_mean(command[1], re.findall(r'[a-z]+', command[2]))}"
    if missing := re.search(r"arguments are required: \w+\.(.*)", message):
        return f"--{missing[1]} is needed; see --help"
    if message.startswith('expected "command"'):
        return "a command is needed; see --help"
    message = re.sub(r"^argument (--\S+):", r"\1:", message.replace("Parser key ", ""))
    return " ".join(message.split())


def _hint_of(config: type | None, key: str) -> Any:
    hint: Any = config
    for name in key.split("."):
        section = section_of(hint)
        hint = get_type_hints(section).get(name) if section else None
    return hint


def _item_keys(config: type | None, key: str) -> list[str]:
    """Keys of the dataclass that is a key's value, or the item of a dict-valued key."""
    hint = _hint_of(config, key)
    section = section_of(get_args(hint)[1] if get_origin(hint) is dict else hint)
    return list(get_type_hints(section)) if section else []


def _expected(config: type, key: str) -> str:
    return in_words(_hint_of(config, key))


def in_words(hint: Any) -> str:
    """A type, for people: `int | None` → `a whole number or null`."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " or ".join(in_words(part) for part in inner)
    if origin is list:
        return f"a list, each {in_words(inner[0])}"
    if origin is tuple:
        return f"a list of {len(inner)}: " + ", ".join(in_words(part) for part in inner)
    if origin is dict:
        return "a mapping of names to " + in_words(inner[1])
    if is_dataclass(hint):
        return "keys (" + ", ".join(field.name for field in fields(hint)) + ")"
    return WORDS.get(hint, str(hint))
