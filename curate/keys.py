"""The keys of a configuration dataclass: their types in words, their help, which values fit, the one a typo meant.

A dataclass may hold `not_here`, {name: why}: keys that a user may well expect there, and what to do instead.
Imports nothing heavy.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from curate.errors import did_you_mean

WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    type(None): "null",
}
LONGEST_SHOWN = 60  # characters of a wrong value


# --- types -----------------------------------------------------------------------------------------------------------


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The parts of a union; of any other type, itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def section_of(hint: Any) -> type | None:
    """The dataclass that a type is, or is beside null; None for anything else."""
    return next((part for part in alternatives(hint) if isinstance(part, type) and is_dataclass(part)), None)


def hint_of(config: type | None, key: str) -> Any:
    """The type of a dotted key; None if there is no such key."""
    hint: Any = config
    for name in key.split("."):
        section = section_of(hint)
        hint = _hints(section).get(name) if section else None
    return hint


@cache
def _hints(config: type) -> dict[str, Any]:
    return get_type_hints(config)


def fits(value: Any, hint: Any) -> bool:
    """Whether a YAML scalar is of a type; a type that is not known here takes anything."""
    return any(_fits_one(value, part) for part in alternatives(hint))


def _fits_one(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return any(value == known and type(value) is type(known) for known in get_args(hint))
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    if hint in (int, bool, str, type(None)):
        return type(value) is hint
    if hint is Path:
        return isinstance(value, str)
    return get_origin(hint) not in (list, tuple, dict) and not is_dataclass(hint)


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
        return "a mapping" if inner[1] is Any else "a mapping of names to " + in_words(inner[1])
    if is_dataclass(hint):
        return "keys (" + ", ".join(field.name for field in fields(hint)) + ")"
    return WORDS.get(hint, str(hint))


def shown(value: Any) -> str:
    """A wrong value, short enough for one line."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 1] + "…"


# --- names -----------------------------------------------------------------------------------------------------------


def documented(config: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, docstring) of every field; a section's is empty: it is shown by its keys.

    Not that of a section that may be null: jsonargparse prints no configuration of an option without help.
    """
    docs = _field_docs(config)
    for name, hint in _hints(config).items():
        key = f"{prefix}.{name}" if prefix else name
        section = section_of(hint)
        yield key, "" if is_dataclass(hint) else docs.get(name, "")
        if section:
            yield from documented(section, key)


def _field_docs(config: type) -> dict[str, str]:
    """Docstrings under the fields of a dataclass and its bases."""
    docs: dict[str, str] = {}
    for owner in reversed([kind for kind in config.__mro__ if is_dataclass(kind)]):
        docs |= _own_field_docs(owner)
    return docs


def _own_field_docs(config: type) -> dict[str, str]:
    body = _classes(config.__module__)[config.__name__].body
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


@cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    """The classes of a module by name; inspect would parse all of it anew for each."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def flags_of(program: str, instead: Mapping[str, str]) -> dict[str, str]:
    """For `not_here`: the flags of another program that a user may come from, and what stands in the place of each."""
    return {flag: f"{program}'s; here {words}" for flag, words in instead.items()}


def no_such_key(key: str, config: type, siblings: Sequence[str] = ()) -> str:
    """What to say of a key that there is not: why it is not here, or the one it looks like.

    Args:
        key: dotted.
        config: the dataclass of the whole file.
        siblings: the names that its section has; where they are known, those before others.
    """
    section, _, leaf = key.rpartition(".")
    owner = section_of(hint_of(config, section) if section else config)
    reasons: Mapping[str, str] = getattr(owner, "not_here", {})
    if leaf in reasons:
        return f"{key}: {reasons[leaf]}"
    return f"no key '{key}'.{_nearest(key, config, siblings)}"


def _nearest(key: str, config: type, siblings: Sequence[str]) -> str:
    """` Did you mean …?` with what the key looks like, or where a key of that name is; else the keys beside it."""
    leaf = key.rpartition(".")[2]
    known = [name for name, _ in documented(config)]
    section = key.removesuffix(leaf)
    beside = difflib.get_close_matches(leaf, siblings, n=1) or [name for name in siblings if name.startswith(leaf)]
    elsewhere = [name for name in known if name.rpartition(".")[2] == leaf]
    alike = difflib.get_close_matches(key, known, n=1)
    # A name that is known, though in another place, before one that is only like it.
    found = elsewhere + [section + name for name in beside] + alike
    return f" Did you mean '{found[0]}'?" if found else did_you_mean(leaf, siblings)
