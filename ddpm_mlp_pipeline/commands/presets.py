"""Command-line flags, and YAML presets of the same names, from a dataclass of options."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import yaml

from ..errors import ConfigurationError
from .parser import CommandParser

Options = TypeVar("Options", bound="_Dataclass")


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


def parse_options(
    cls: type[Options], argv: Sequence[str] | None, description: str, presets: Path | None = None
) -> Options:
    """Read a dataclass of options from the command line and from the YAML preset that `--config` names.

    Each field becomes a flag of its name and type, with the `help` and `choices` of its metadata. A preset's lines are
    put before the command line's arguments: the command line wins, and both have the same checks.

    Args:
        cls: a dataclass; fields without a default are required.
        argv: the arguments, without the program's name; `sys.argv` by default.
        description: the description for `--help`.
        presets: the folder of the shipped presets.

    Raises:
        ConfigurationError: if the preset doesn't exist, isn't a mapping, or sets an unknown option, or if a value is
            invalid. The dataclass may raise other errors.
    """
    parser = CommandParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--config", metavar="PRESET", help="a YAML file of these options, or a shipped one's name")
    types_of = typing.get_type_hints(cls)
    arguments = {field.name: _argument(field, types_of[field.name]) for field in dataclasses.fields(cls)}
    for name, argument in arguments.items():
        parser.add_argument(f"--{name}", **argument)

    argv = sys.argv[1:] if argv is None else list(argv)
    config = CommandParser(add_help=False)
    config.add_argument("--config")
    preset = config.parse_known_args(argv)[0].config
    if preset is not None:
        argv = _as_argv(preset, read_preset(preset, presets), arguments) + argv

    values = vars(parser.parse_args(argv))
    del values["config"]
    return cls(**values)


class _PresetLoader(yaml.SafeLoader):
    """A loader that refuses aliases (`*name`), a few of which can expand to gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name): write the value instead")
        return super().compose_node(parent, index)


def _argument(field: dataclasses.Field[Any], type_: Any) -> dict[str, Any]:
    """Return the arguments of `add_argument` for a field."""
    argument: dict[str, Any] = {"help": field.metadata.get("help", "")}
    if field.default is dataclasses.MISSING:
        argument["required"] = True
    else:
        argument["default"] = field.default
    if type_ is bool:
        return argument | {"action": argparse.BooleanOptionalAction}
    if isinstance(type_, types.UnionType):  # such as int | None, where None means that the flag is absent
        (type_,) = (member for member in type_.__args__ if member is not types.NoneType)
    if typing.get_origin(type_) is Sequence:
        (member,) = typing.get_args(type_)
        return argument | {"type": member, "nargs": "+", "metavar": "N" if member is int else "NAME"}
    return argument | {"type": type_, "choices": field.metadata.get("choices")}


def read_preset(preset: str, presets: Path | None) -> dict[str, Any]:
    """Read a preset's options by name, with the types that YAML gives them.

    Args:
        preset: a YAML file, or the name without suffix of one in `presets`.
        presets: the folder of the shipped presets.

    Raises:
        ConfigurationError: if the preset doesn't exist, isn't valid YAML, or isn't a mapping.
    """
    path = Path(preset)
    if not path.is_file() and presets is not None:
        path = presets / f"{preset}.yaml"
    if not path.is_file():
        names = sorted(file.stem for file in presets.glob("*.yaml")) if presets else []
        raise ConfigurationError(f"there is no preset {preset!r}; give a YAML file, or one of: {', '.join(names)}")
    try:
        options = yaml.load(path.read_text(encoding="utf-8"), _PresetLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigurationError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(options, dict):
        raise ConfigurationError(f"{path} must hold lines of the form `option: value`")
    return options


def _as_argv(preset: str, options: dict[str, Any], arguments: dict[str, dict[str, Any]]) -> list[str]:
    unknown = sorted(str(key) for key in options.keys() - arguments.keys())
    if unknown:
        raise ConfigurationError(f"{preset} sets {', '.join(unknown)}, which this command does not have: see --help")
    argv = []
    for key, value in options.items():
        is_list = isinstance(value, list) and not any(isinstance(item, dict | list) for item in value)
        if is_list and "nargs" in arguments[key]:
            argv += [f"--{key}", *map(str, value)]
        elif isinstance(value, dict | list):
            raise ConfigurationError(f"{preset} must set {key} to one value")
        elif isinstance(value, bool):
            argv.append(f"--{key}" if value else f"--no-{key}")
        elif value is not None:
            argv.append(f"--{key}={value}")
    return argv
