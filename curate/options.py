"""From YAML files and dotted flags to a configuration dataclass, with one clear line for every mistake.

jsonargparse parses, checks types and prints (`--print_config`). Added here: a YAML file is checked against the
dataclass before anything is parsed, so that a mistake has its line (jsonargparse knows none, and passes over a section
that is not a mapping); an unknown key comes with the nearest there is; jsonargparse's several-line messages become one;
and each option's help is the docstring under its field. Imports nothing heavy.
"""

from __future__ import annotations

import argparse
import difflib
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace  # type: ignore[attr-defined]

from curate.errors import ConfigError, did_you_mean
from curate.keys import alternatives, documented, fits, hint_of, in_words, no_such_key, section_of, shown

Config = TypeVar("Config")


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
    docs = dict(documented(config))
    for action in parser._actions:
        if action.dest in docs:
            action.help = docs[action.dest].replace("%", "%%") or argparse.SUPPRESS
    for group in parser._action_groups:
        if group.title and group.title.startswith("<class") and group._group_actions:
            group.title = group._group_actions[-1].dest.rpartition(".")[0] or "run"


# --- parsing ---------------------------------------------------------------------------------------------------------


def parse(parser: ArgumentParser, arguments: Sequence[str], configs: Mapping[str, type]) -> Namespace:
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
            check_file(path, config)
    try:
        return parser.instantiate(parser.parse_args(list(arguments)))
    except argparse.ArgumentError as error:
        raise ConfigError(_one_line(str(error), config)) from error


def _spelled_out(arguments: Sequence[str], config: type) -> list[str]:
    """Flags with hyphens as keys with underscores, and a true-or-false flag without a value as true."""
    switches = {f"--{key}" for key, _ in documented(config) if hint_of(config, key) is bool}
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
    lines = check_file(path, config)
    parser = new_parser("")
    add_config(parser, config)
    try:
        return as_config(parser.instantiate(parser.parse_args(["--config", str(path)])), config)
    except argparse.ArgumentError as error:
        raise ConfigError(_at_line(f"{path}: ", _one_line(str(error), config), lines)) from error


def as_config(read: Namespace, config: type[Config]) -> Config:
    """The part of a parsed command line that a configuration dataclass holds."""
    return config(**{field.name: read[field.name] for field in fields(config)})  # type: ignore[arg-type]


def _config_files(arguments: Sequence[str]) -> Iterator[Path]:
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if word == "--config" and following:
            yield Path(following)
        elif word.startswith("--config="):
            yield Path(word.removeprefix("--config="))


def located(message: str, arguments: Sequence[str], configs: Mapping[str, type]) -> str:
    """A message that begins with a key, with the file and line that set it; not where a flag did.

    Args:
        message: of any error; one that begins with something else stays as it is.
        arguments: the command line, which `parse` has taken.
        configs: as for `parse`.
    """
    config = configs.get(arguments[0]) if arguments else None
    # A key of a section in a list, data.sources[1].path, has a line of its own, and filters[1] 'name' that of its first
    # key; an item of plain values has its list's.
    found = re.match(r"([^\s:\[]+(?:\[\d+\]\.[^\s:\[]+)*)(\[\d+\])?(?: '[^']*')?: ", message)
    flags = {word.partition("=")[0].replace("-", "_").lstrip("_") for word in arguments if word.startswith("--")}
    if not config or not found or found[1] in flags:
        return message
    for path in reversed(list(_config_files(arguments))):
        try:
            lines = check_file(path, config)
        except ConfigError:  # the message itself, most likely
            return message
        of_item = [line for key, line in lines.items() if found[2] and key.startswith(f"{found[1]}{found[2]}.")]
        if of_item or found[1] in lines:
            return f"{path}:{min(of_item or [lines[found[1]]])}: {message}"
    return message


def _at_line(otherwise: str, message: str, lines: Mapping[str, int]) -> str:
    line = lines.get(message.partition(":")[0])
    return f"{otherwise[:-2]}:{line}: {message}" if line else otherwise + message


# --- presets ---------------------------------------------------------------------------------------------------------


def with_presets(arguments: Sequence[str], package: str) -> list[str]:
    """A command line with the path of the preset in place of its name, after each `--config`.

    Raises:
        ConfigError: there is neither such a file nor such a preset.
    """
    words = []
    for before, word in pairwise(["", *arguments]):
        flag, equals, value = word.partition("=")
        if before == "--config":
            words.append(preset(word, package))
        elif flag == "--config" and equals:
            words.append(f"--config={preset(value, package)}")
        else:
            words.append(word)
    return words


def preset(name: str, package: str) -> str:
    """The path of a configuration: a file of that name, else the preset.

    Raises:
        ConfigError: there is neither; names the presets.
    """
    known = presets(package)
    if Path(name).is_file() or (Path(name).exists() and name not in known):
        return name
    if name not in known:
        near = did_you_mean(name, known) if difflib.get_close_matches(name, known, n=1) else ""
        raise ConfigError(f"--config {name}: no such file, and no preset; presets: {', '.join(known)}.{near}")
    return known[name]


def presets(package: str) -> dict[str, str]:
    """Path of each recipe that ships with a package, by its name."""
    with resources.as_file(resources.files(package) / "recipes") as folder:
        return {path.stem: str(path) for path in sorted(folder.glob("*.yaml"))}


# --- YAML files, with line numbers -----------------------------------------------------------------------------------

MAPPING, SEQUENCE = "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"


class _Loader(yaml.SafeLoader):
    """Reads numbers as jsonargparse does and YAML 1.2 has it: 1e-4 is one; and no text as a date."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the name and form that PyYAML gives it
        first: [(tag, form) for tag, form in forms if tag != "tag:yaml.org,2002:timestamp"]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def check_file(path: Path, config: type) -> dict[str, int]:
    """Check that a YAML file has only keys that a configuration dataclass has, each once, with values of their types.

    Returns:
        The line of each key, from 1.

    Raises:
        ConfigError: no such file, not YAML, empty, an unknown key, a value of another type; names file and line.
    """
    try:
        loader = _Loader(path.read_text(encoding="utf-8-sig"))
        root = loader.get_single_node()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(f"--config {path}: cannot be read ({reason})") from error
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"--config {path}: cannot be read (no text: {error.reason})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not YAML ({getattr(error, 'problem', error)})") from error
    if root is None:
        raise ConfigError(f"{path}: empty; expected {in_words(config)}")
    file = _File(path, config, loader)
    file.check(root, config, "")
    return file.lines


@dataclass(frozen=True)
class _File:
    """A YAML file on its walk along the types it should have."""

    path: Path
    config: type
    loader: Any
    lines: dict[str, int] = field(default_factory=dict)
    walked: set[int] = field(default_factory=set)

    def check(self, node: yaml.Node, hint: Any, key: str) -> None:
        """Check the value of a key, and what is in it."""
        for part in alternatives(hint):
            inner = self._inner(node, part, key)
            if inner is not None:
                for each in inner:
                    self.check(*each)
                return
        if isinstance(node, yaml.CollectionNode) and hint is Any:
            return
        value = self._value(node)
        if isinstance(node, yaml.CollectionNode) or not fits(value, hint):
            self._fail(node, f"{key or 'the file'}: expected {in_words(hint)}, got {shown(value)}", key)

    def _inner(self, node: yaml.Node, hint: Any, key: str) -> list[tuple[yaml.Node, Any, str]] | None:
        """(value, type, key) of all that is in a section, mapping or list; None if it is none of that type."""
        origin, hints = get_origin(hint), get_args(hint)
        if isinstance(node, yaml.MappingNode) and node.tag == MAPPING:
            if is_dataclass(hint):
                return self._section(node, hint, key)
            if origin is dict:
                return [(item, hints[1], f"{key}.{name}") for name, item in self._items(node, key)]
        if isinstance(node, yaml.SequenceNode) and node.tag == SEQUENCE:
            hints = hints * len(node.value) if origin is list else hints
            if origin in (list, tuple) and len(hints) == len(node.value):
                return [(node.value[n], hint, f"{key}[{n}]") for n, hint in enumerate(hints)]
        return None

    def _section(self, node: yaml.MappingNode, section: Any, key: str) -> list[tuple[yaml.Node, Any, str]]:
        hints, inner = get_type_hints(section), []
        for name, item in self._items(node, key):
            full = f"{key}.{name}" if key else name
            if name not in hints:
                raise ConfigError(f"{self.path}:{self.lines[full]}: {no_such_key(full, self.config, [*hints])}")
            inner.append((item, hints[name], full))
        return inner

    def _items(self, node: yaml.MappingNode, key: str) -> list[tuple[str, yaml.Node]]:
        """(name, value) of a mapping, its merges (`<<`) with it."""
        if id(node) not in self.walked:  # an alias leads here again
            self.walked.add(id(node))
            self._check_names(node, key)
            try:
                self.loader.flatten_mapping(node)
            except yaml.YAMLError as error:
                self._fail(node, f"not YAML ({getattr(error, 'problem', error)})")
        for name, _ in node.value:
            self.lines[f"{key}.{name.value}" if key else name.value] = name.start_mark.line + 1
        return [(name.value, value) for name, value in node.value]

    def _check_names(self, node: yaml.MappingNode, key: str) -> None:
        seen: dict[str, int] = {}
        for name, _ in node.value:
            if not isinstance(name, yaml.ScalarNode):
                self._fail(name, f"{key or 'the file'}: expected a name before the colon")
            if name.value in seen:
                full = f"{key}.{name.value}" if key else name.value
                self._fail(name, f"{full}: given twice, first in line {seen[name.value]}")
            seen[name.value] = name.start_mark.line + 1

    def _value(self, node: yaml.Node) -> Any:
        try:
            return self.loader.construct_document(node)
        except yaml.YAMLError as error:  # a tag such as !!python/object, a date that is none
            self._fail(node, f"not YAML ({getattr(error, 'problem', error)})")

    def _fail(self, node: yaml.Node, message: str, key: str = "") -> NoReturn:
        # A list may begin in the line after its key.
        raise ConfigError(f"{self.path}:{self.lines.get(key, node.start_mark.line + 1)}: {message}")


# --- jsonargparse's messages in one line -----------------------------------------------------------------------------


def _one_line(message: str, config: type | None) -> str:
    """What jsonargparse says over several lines, as: key: expected …, got …."""
    unknown = re.search(r"unrecognized arguments: --([\w.]+)|does not accept option '([^']+)'", message)
    if config and unknown:
        return no_such_key(unknown[1] or unknown[2], config)
    if inner := re.search(r'Parser key "([^"]+)":.*Option \'(\w+)\' is not accepted', message, re.DOTALL):
        return f"{inner[1]}: no key '{inner[2]}'.{did_you_mean(inner[2], _item_keys(config, inner[1]))}"
    value = re.search(r'Parser key "([^"]+)":.*(?:Got|Given) value: ([^\n]*)', message, re.DOTALL)
    if value and config:
        return f"{value[1]}: expected {in_words(hint_of(config, value[1]))}, got {shown(value[2])}"
    if section := re.search(r'"([\w.]+)": Unable to load config', message):
        known = [name for name, _ in documented(config)] if config else []
        sections = {name.rpartition(".")[0] for name in known}
        keys = [f"--{name}" for name in known if name.startswith(f"{section[1]}.") and name not in sections]
        return f"{section[1]}: has keys of its own: {', '.join(keys[:3])}, …"
    if command := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
        return f"no command '{command[1]}'.{did_you_mean(command[1], re.findall(r'[a-z]+', command[2]))}"
    if missing := re.search(r"arguments are required: \w+\.(.*)", message):
        return f"--{missing[1]} is needed; see --help"
    if message.startswith('expected "command"'):
        return "a command is needed; see --help"
    message = re.sub(r"^argument (--\S+):", r"\1:", message.replace("Parser key ", ""))
    return " ".join(message.split())


def _item_keys(config: type | None, key: str) -> list[str]:
    """Keys of the dataclass that is a key's value, or the item of a dict-valued key."""
    hint = hint_of(config, key)
    section = section_of(get_args(hint)[1] if get_origin(hint) is dict else hint)
    return list(get_type_hints(section)) if section else []
