"""A configuration as JSON and back, and the words for its types that messages use.

A field's declared type is often a base class (`task`, `model`, `rule`), so an instance of a subclass carries
{"type": "module:Class"}. A class that an experiment file defines is found again through the file.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import json
import sys
import traceback
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from ponder.config import Config
from ponder.errors import UserError

_PROJECT = Path(__file__).resolve().parents[1]


def to_json(config: Config) -> dict[str, Any]:
    """The configuration as JSON values. An instance of a subclass carries {"type": "module:Class"}."""
    return _encode(config, Config)


def from_json(values: dict[str, Any]) -> Config:
    """The configuration back. Raises UserError on an unknown key, a missing one, a bad value or an unknown class."""
    return _decode(values, Config, "config")


def hints(cls: type) -> dict[str, Any]:
    """Types of a dataclass's fields, resolved."""
    types_ = typing.get_type_hints(cls, include_extras=True)
    return {field.name: types_[field.name] for field in dataclasses.fields(cls) if field.init}


def _encode(value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        cls = type(value)
        kind = {} if cls is hint else {"type": _tag(cls)}
        return kind | {name: _encode(getattr(value, name), inner) for name, inner in hints(cls).items()}
    if isinstance(value, tuple):
        return [_encode(item, None) for item in value]
    return value


def _decode(value: Any, hint: Any, where: str) -> Any:
    if isinstance(value, dict):
        cls = _untag(value["type"], where) if "type" in value else hint
        if not dataclasses.is_dataclass(cls):
            raise UserError(f"{where} is a group, expected {describe(hint)}")
        fields, given = hints(typing.cast(type, cls)), {name: v for name, v in value.items() if name != "type"}
        for name in given:
            if name not in fields:
                raise UserError(f"unknown {where}.{name}{nearest(name, fields)}")
        decoded = {name: _decode(inner, fields[name], f"{where}.{name}") for name, inner in given.items()}
        try:
            return typing.cast(Any, cls)(**decoded)
        except TypeError as error:  # a field without default is missing
            raise UserError(f"{where} is incomplete: {error}") from error
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        for choice in get_args(hint):
            if choice is not type(None):
                try:
                    return _decode(value, choice, where)
                except UserError:
                    continue
    elif origin is Literal:
        if value in get_args(hint):
            return value
    elif origin is tuple and isinstance(value, list):
        inner = get_args(hint)
        each = [inner[0]] * len(value) if inner[-1:] == (Ellipsis,) else list(inner)
        if len(each) == len(value):
            return tuple(_decode(item, type_, where) for item, type_ in zip(value, each, strict=True))
    elif hint is Any or (isinstance(hint, type) and type(value) is hint):
        return value
    elif hint is float and type(value) is int:
        return float(value)
    raise UserError(f"{where} is {json.dumps(value)}, expected {describe(hint)}")


def describe(hint: Any) -> str:
    """A type, in words for a message."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is typing.Annotated:
        return describe(inner[0])
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(choice) for choice in inner)
    if origin is tuple:
        items = (describe(inner[0]), "...") if inner[-1:] == (Ellipsis,) else map(describe, inner)
        return f"a list ({', '.join(items)})"
    if hint is type(None):
        return "None"
    words: dict[Any, str] = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
    return words.get(hint) or str(getattr(hint, "__name__", hint))


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`; nearest: a, b`, or all names where none is near and they are few."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3)
    near += [other for other in known if other.rpartition(".")[2] == name.rpartition(".")[2] and other not in near]
    if not near and len(known) > 12:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
    return f"; {'nearest' if near else 'known'}: {', '.join(prefix + other for other in near or known)}"


def _tag(cls: type) -> str:
    """`module:Class`. A class from an experiment file has that file for its module, as seen from the project."""
    module = cls.__module__
    if module.endswith(".py") and Path(module).is_relative_to(_PROJECT):
        module = Path(module).relative_to(_PROJECT).as_posix()
    return f"{module}:{cls.__qualname__}"


def _untag(tag: Any, where: str) -> type:
    try:
        module_name, _, name = tag.rpartition(":")
        if module_name.endswith(".py"):
            file = Path(module_name)
            file = file if file.exists() else _PROJECT / file
            module = load_file(file)
        else:
            module = importlib.import_module(module_name)
        return functools.reduce(getattr, name.split("."), module)  # type: ignore[return-value]
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{where}.type is {tag!r}, which is not to be found here") from error


def load_file(file: Path) -> types.ModuleType:
    """Run a Python file as a module whose name is its full path, so that its classes can be found again.

    A file that has not changed since it was run gives the same module, so its classes stay the same.

    Raises UserError where there is no such file or it cannot be run, with the line that fails.
    """
    file = file.resolve()
    if not file.is_file():
        raise UserError(f"no experiment file {file}")
    source = file.read_bytes()
    loaded = sys.modules.get(str(file))
    if loaded is not None and vars(loaded).get("__source__") == source:
        return loaded
    spec = importlib.util.spec_from_file_location(str(file), file)
    assert spec is not None and spec.loader is not None  # a file that ends in .py has both
    module = importlib.util.module_from_spec(spec)
    vars(module)["__source__"] = source
    sys.modules[str(file)] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[str(file)]
        if isinstance(error, UserError) or not isinstance(error, Exception):
            raise
        line = _line_of(file, error)
        what = error.msg if isinstance(error, SyntaxError) else error
        raise UserError(f"{file}{f' line {line}' if line else ''}: {type(error).__name__}: {what}") from error
    return module


def _line_of(file: Path, error: Exception) -> int | None:
    """The line of the file that an error came through."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return lines[-1] if lines else None
