"""Command-line flags derived from a configuration dataclass: name, type, default and help are declared once."""

from __future__ import annotations

import argparse
import ast
import inspect
import textwrap
from dataclasses import MISSING, Field, fields
from itertools import pairwise
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

Config = TypeVar("Config")


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of `cls`, on one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for item, following in pairwise(definition.body):
        if not (isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            docs[item.target.id] = " ".join(str(following.value.value).split())
    return docs


def add_flags(parser: argparse.ArgumentParser, cls: type, defaults: Any = None) -> None:
    """Adds one flag for each field of the dataclass `cls`.

    bool -> `--x/--no-x`; Literal -> choices; `tuple[T, ...]` -> any number of values; `field(metadata={"const": v})`
    lets the flag stand without a value and mean v, `metadata={"also": name}` gives it a second name. `defaults` is an
    instance of `cls` to take default values from.
    """
    hints, docs = get_type_hints(cls), field_docs(cls)
    for entry in fields(cls):
        default = getattr(defaults, entry.name) if defaults is not None else _default(entry)
        names = [f"--{entry.name}", *([f"--{entry.metadata['also']}"] if "also" in entry.metadata else [])]
        parser.add_argument(*names, default=default, **_options(entry, hints[entry.name], docs, default))


def from_flags(cls: type[Config], args: argparse.Namespace) -> Config:
    """An instance of `cls` from parsed flags; its own checks raise `ValueError`."""
    values = {entry.name: getattr(args, entry.name) for entry in fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def device(text: str) -> torch.device:
    """Type of a `--device` flag: a torch device that exists on this machine."""
    try:
        found = torch.device(text)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"expected a usable torch device, found {text!r}") from error
    return found


def _default(entry: Field) -> Any:
    return entry.default_factory() if entry.default_factory is not MISSING else entry.default


def _options(entry: Field, hint: Any, docs: dict[str, str], default: Any) -> dict[str, Any]:
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    text = f"{docs.get(entry.name, '')} (default: {shown})".strip().replace("%", "%%")
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction, "help": text}
    options: dict[str, Any] = {"help": text}
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (kind for kind in get_args(hint) if kind is not type(None))
    if get_origin(hint) is tuple:
        return {**options, "nargs": "*", "type": get_args(hint)[0]}
    if get_origin(hint) is Literal:
        options |= {"choices": get_args(hint), "type": type(get_args(hint)[0])}
    else:
        options["type"] = hint
    if "const" in entry.metadata:
        options |= {"nargs": "?", "const": entry.metadata["const"]}
    return options
