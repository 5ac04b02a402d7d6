"""Plain data (what YAML holds) into frozen dataclasses, with an error for everything that does not fit.

Every error is a ValueError that names the key as it is written in the recipe (``training.steps``), what came and what
is wanted.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union

T = TypeVar("T")


def build(cls: type[T], values: object, path: str = "") -> T:
    """An instance of dataclass ``cls`` from a mapping of its fields; nested dataclasses from nested mappings.

    Field types may be bool, int, float, str, None, Literal, tuple[X, ...], Mapping[str, Any], a dataclass, or a union
    of those. An int is taken where a float is wanted; nothing else is converted (a bool is no int, "3" is no number).
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{path or 'recipe'}: wanted a mapping of keys, got {_show(values)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    check_keys(values, fields, path)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ValueError(f"{_join(path, name)}: missing; wanted {_describe(hints[name])}")
    return cls(**{name: _convert(hints[name], value, _join(path, name)) for name, value in values.items()})


def check_keys(values: Mapping[Any, object], known: Iterable[str], path: str) -> None:
    """Raises a ValueError for the first key that is not known, with the likeliest known ones."""
    known = list(known)
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(sorted(known))}"
            raise ValueError(f"{_join(path, str(key))}: unknown key; {hint}")


def plain(value: object) -> Any:
    """The inverse of :func:`build`: dataclasses to dicts, tuples to lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _convert(hint: Any, value: object, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        if len(options) == 1:
            return _convert(options[0], value, path)
        for option in options:
            try:
                return _convert(option, value, path)
            except ValueError:
                continue
    elif origin is Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_convert(args[0], item, f"{path}[{n}]") for n, item in enumerate(value))
    elif dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, path)  # type: ignore[arg-type]
    elif origin is not None and issubclass(origin, Mapping):
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return dict(value)
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint is Any or isinstance(value, hint):
        return value
    raise ValueError(f"{path}: wanted {_describe(hint)}, got {_show(value)}")


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(a) for a in args)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if origin is tuple:
        return f"a list of {_describe(args[0])}"
    if dataclasses.is_dataclass(hint) or (origin is not None and issubclass(origin, Mapping)):
        return "a mapping of keys"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "nothing"}
    return names.get(hint, str(hint))


def _show(value: object) -> str:
    return "nothing" if value is None else f"{value!r} ({type(value).__name__})"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
