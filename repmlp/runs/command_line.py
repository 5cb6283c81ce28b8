"""The words of a command line: made ready for Hydra, refused where they would be ignored, and what Hydra says of them.

Light: no torch, no Lightning, so that a mistake is told at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from repmlp.runs.settings import unknown, words_for


def does_runs(configuration: Path, command: str) -> bool:
    """Say whether a command does runs, which can be swept. configuration: the folder of its file `command`.yaml."""
    return bool({"run", "config"} & set(OmegaConf.load(configuration / f"{command}.yaml").defaults))


def refused(words: list[str], configuration: Path, command: str) -> str | None:
    """Say in one line which word of a command line Hydra would take and nothing would heed; None where there is none.

    `+NAME=VALUE` adds a setting that nothing reads: every setting is there without a plus, which is for groups of the
    settings of runs (+sweep=NAME, +change=NAME) and for Hydra's own. `~NAME` would leave a run without a setting.
    configuration: the folder of the groups; command: the name of the command's own file in it.
    """
    runs = does_runs(configuration, command)
    if not runs and {"-m", "--multirun"} & set(words):
        return "-m: only runs can be swept; do this command once for each value"
    names: list[str] = []
    for text in words:
        mark = re.match(r"[+~]|--(?=\w+[.=_])", text)
        name, _, value = text.lstrip("+~-").partition("=")
        of_group = _group(name, configuration)
        if not mark or name.startswith(("hydra", "config")) or (mark[0] == "+" and runs and of_group):
            continue
        names = names or _names(words, configuration, command)
        if name not in names and not any(each.startswith(f"{name}.") for each in names):
            return f"{text}: {str(unknown(name, value, names)).partition(': ')[2]}"
        if mark[0] == "~":
            return f"{text}: no setting can be taken away; leave this out for its default, or say {name}=VALUE"
        return f"{text}: write {name}={value or 'VALUE'}, without the {mark[0]}"
    return None


def _group(name: str, configuration: Path) -> bool:
    """Say whether a name is that of a group, "sweep" or "model@other"."""
    return bool(name) and configuration.joinpath(*name.split("@")[0].split("/")).is_dir()


def _names(words: list[str], configuration: Path, command: str) -> list[str]:
    """Return the settings that a command has with the groups that its words choose."""
    chosen = [text for text in words if _group(text.partition("=")[0], configuration) and "," not in text]
    with initialize_config_dir(str(configuration.absolute()), version_base="1.3"):
        return _flat(compose(command, chosen))


def _flat(config: DictConfig, prefix: str = "") -> list[str]:
    """Return the dotted names of all settings."""
    names = []
    for key in config:
        node = config._get_node(key)
        names += (
            _flat(node, f"{prefix}{key}.")
            if isinstance(node, DictConfig) and not node._is_none()
            else [f"{prefix}{key}"]
        )
    return names


def message_of(error: Exception, swept: bool = True) -> str:
    """Return what Hydra or OmegaConf complains of, in one line that names the setting and what it can be.

    swept: whether the command takes -m.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    if cause is not None and cause.full_key:
        parent = cause.parent_node
        where = str(cause.full_key).rpartition(".")[0]
        absent = parent is not None and isinstance(parent, DictConfig) and cause.key not in parent
        if absent:
            names = [each for each in _flat(parent._get_root()) if not each.startswith("hydra.")]
            names.sort(key=lambda each: each.rpartition(".")[0] == where)  # of equal names the last is offered
            return str(unknown(str(cause.full_key), "...", names)).replace("=...", "", 1)
        if isinstance(cause, ValidationError) and (wanted := _wanted(cause)):
            given = "null" if cause.value is None else cause.value
            return f"{cause.full_key}={given}: use {wanted}"
        reason = str(cause.msg or cause).splitlines()[0]
        return f"{cause.full_key}: {reason}"
    text = " ".join(str(error).partition("Config search path:")[0].split())
    if several := re.match(r"Ambiguous value for argument '(([^']*?)=.*?)' 1\.", text):
        return (
            f"{several[1]}: these are several values; {'add -m to do a run with each, or ' if swept else ''}"
            f"write a list, {several[2]}=[{several[1].partition('=')[2]}]"
        )
    if twice := re.match(r"Multiple values for (\w+)\.|(\w+) appears more than once", text):
        group = twice[1] or twice[2]
        return f"{group}: one of this group is chosen already; say {group}=NAME once"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: write NAME=VALUE; a value with marks such as ( [ = in quotes, \"NAME='VALUE'\""
    return text


def _wanted(error: ValidationError) -> str | None:
    """Say what a setting can be whose value has another type; None where it is not one of those in settings.py."""
    of = error.object_type
    if is_dataclass(of):
        kind = get_type_hints(of).get(str(error.key), Any)
        words = f"{error.full_key}.NAME=VALUE for its settings" if is_dataclass(kind) else words_for(kind)
    else:  # of a list
        words = words_for(*get_args(error.ref_type)) if get_origin(error.ref_type) is list else None
    return f"{words}, or leave it out for its default" if words and error.value is None else words


def place(path: str | Path) -> Path:
    """Return the absolute place of a path, a relative one taken from the folder that the user stands in."""
    return (Path(os.environ.get("REPMLP_CWD", "")) / Path(path).expanduser()).absolute()


def quote_file_names(
    arguments: list[str], names: tuple[str, ...] = ("checkpoint", "onnx", "out", "images")
) -> list[str]:
    """Quote the values of settings that name a file, where Hydra would read = or other marks in one as its grammar."""
    quoted = []
    for text in arguments:
        name, equals, value = text.partition("=")
        if equals and name in names and value[:1] not in "'\"":
            value = _quoted(value)
        quoted.append(f"{name}{equals}{value}")
    return quoted


def quote_names(arguments: list[str], groups: Iterable[str]) -> list[str]:
    """Quote the values of settings that are names, where Hydra would read a number or a truth: 1e3 as 1000.0.

    groups: the groups of settings, whose values are names of files; "null" is none.
    """
    return [
        f"{name}='{value}'"
        if equals
        and (
            (name == "study" and re.fullmatch(r"[\w.+-]+", value) and value != "null")
            or (name in groups and re.fullmatch(r"null|true|false|[\d.+-][\w.+-]*", value))
        )
        else text
        for text in arguments
        for name, equals, value in [text.partition("=")]
    ]


def place_files(arguments: list[str], names: tuple[str, ...] = ("data.root", "weights", "backbone")) -> list[str]:
    """Let relative paths in settings that name what runs read start from the folder that the user stands in.

    A comma stands between the values of a sweep, "weights=null,FILE", unless there is a file of that name.
    """
    placed = []
    for text in arguments:
        name, equals, value = text.partition("=")
        if equals and name in names and value and not re.search(r"^[\['\"]|\$", value):
            values = [value] if place(value).exists() else value.split(",")
            text = f"{name}={','.join(one if one == 'null' else _quoted(str(place(one))) for one in values)}"
        placed.append(text)
    return placed


def _quoted(value: str) -> str:
    """Put a value into quotes where Hydra would read marks in it as its grammar."""
    return "'" + value.replace("'", "\\'") + "'" if re.search(r"[=,{}()\[\]:]", value) else value
