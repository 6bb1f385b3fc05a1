"""Read profiles of adapters: YAML files in folders of plugins and of the user.

    $XDG_CONFIG_HOME/council/profiles/NAME.yaml    (by default ~/.config)

A profile selects programs, which also run without a sandbox to report their version. So nothing that an agent can write
may become a profile: files in a repository are rejected, as are files of other users.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final

from pydantic import BaseModel

from orchestrator.config.load import read_file
from orchestrator.config.source.document import Node
from orchestrator.config.source.problems import Position, Problems
from orchestrator.config.source.validation import reject_empty_keys, validate
from orchestrator.domain.settings.names import check_name
from orchestrator.domain.wording import quote_text, suggest
from orchestrator.errors import ConfigError, InvalidValue
from orchestrator.protocols import Adapter, AdapterType, ProfileFormat

SUFFIX: Final = ".yaml"
_EXTENDS: Final = "extends"
#: The number of errors of a profile to report outside of its own file.
_MOST_SHOWN: Final = 3
_START: Final = Position(1, 1)


class ProfileAdapterType:
    """An adapter type that is read from its file on first use, because most commands use few of them."""

    def __init__(self, file: Path, profile_format: ProfileFormat) -> None:
        """Use the valid profile in `file`."""
        self._file, self._format = file, profile_format

    @property
    def Options(self) -> type[BaseModel]:  # noqa: N802  as in the protocol
        """The model of the entry's own keys."""
        return self._type.Options

    def __call__(self, options: BaseModel, /) -> Adapter:
        """Create the adapter."""
        return self._type(options)

    @cached_property
    def _type(self) -> AdapterType:
        return read_profile(self._file, self._format, {})


def list_profiles(folder: Path) -> dict[str, Path]:
    """Return the files of profiles in a folder by name. Blocks."""
    return {file.stem: file for file in sorted(folder.glob(f"*{SUFFIX}"))} if folder.is_dir() else {}


def user_profiles_folder(environ: Mapping[str, str]) -> Path | None:
    """Return the folder of the user's profiles, which may be missing."""
    folder = environ.get("XDG_CONFIG_HOME") or (environ.get("HOME") and f"{environ['HOME']}/.config")
    return Path(folder).absolute() / "council" / "profiles" if folder else None


def read_profile(file: Path, profile_format: ProfileFormat, extended: Mapping[str, Path]) -> AdapterType:
    """Return the adapter type of a profile. Blocks.

    `extended` are the profiles that it may extend. Raises ConfigError with all errors in the file.
    """
    problems = Problems(file)
    node = _read(file, extended, problems)
    made = None if node is None or problems else validate(profile_format.Model, node, problems)
    if made is None:
        raise problems.error()
    return profile_format.make(file.stem, made)


def check_is_own(file: Path, untrusted: Sequence[Path], taken: Collection[str]) -> None:
    """Raise ConfigError for a profile that others can write, or whose name is taken.

    `untrusted` are repositories, where agents write.
    """
    problems, real = Problems(file), file.resolve()
    try:
        status = real.stat()
        check_name(file.stem)
    except OSError as error:
        problems.add(_START, f"can't read the file: {(error.strerror or str(error)).lower()}", "use a readable file")
    except InvalidValue as invalid:
        problems.add(_START, invalid.message, f"rename the file: {invalid.remedy}")
    else:
        repository = next((folder for folder in untrusted if real.is_relative_to(folder.resolve())), None)
        if repository is not None:
            problems.add(_START, f"the file is inside the repository {repository}, where agents write", "move it")
        if file.stem in taken:
            problems.add(_START, f"there is already an adapter type {quote_text(file.stem)}", "rename the file")
        if status.st_uid not in {0, os.geteuid()} or status.st_mode & 0o002:
            problems.add(_START, "another user can change the file", f"own it, and run `chmod o-w {file}`")
    if problems:
        raise problems.error()


def _read(file: Path, extended: Mapping[str, Path], problems: Problems) -> Node | None:
    """Return the mapping in a file, on top of the profile that it extends."""
    node = read_file(file, problems, "docs, install and argv")
    reject_empty_keys(node, problems)
    base = None if node is None else node.children.get(_EXTENDS)
    if node is None or base is None:
        return node
    if not isinstance(base.value, str) or base.value not in extended:
        remedy = suggest(str(base.value), extended, "the profiles")
        problems.add(base.at, f"there is no profile {quote_text(str(base.value))} to extend", remedy)
        return None
    below = _read(extended[base.value], {}, problems)
    return None if below is None else _overlay(below, node, without=(_EXTENDS,))


def _overlay(below: Node, above: Node, without: Sequence[str] = ()) -> Node:
    """Return merged mappings, in which `above` takes precedence; lists of variables are joined."""
    children = dict(_merged(below, above, without))
    value = {str(key): child.value for key, child in children.items()}
    return Node(above.at, value, children, {**below.keys, **above.keys})


def _merged(below: Node, above: Node, without: Sequence[str]) -> Iterator[tuple[str | int, Node]]:
    own = {key: child for key, child in above.children.items() if key not in without}
    for key, child in {**own, **below.children, **own}.items():  # own keys first: the first matching pattern applies
        old = below.children.get(key)
        if key not in own or old is None:
            yield key, child
        elif isinstance(old.value, dict) and isinstance(child.value, dict):
            yield key, _overlay(old, child)
        elif key == "env" and isinstance(old.value, list) and isinstance(child.value, list):
            items = [*old.children.values(), *child.children.values()]
            yield key, Node(child.at, [item.value for item in items], dict(enumerate(items)))
        else:
            yield key, child


def describe_errors(error: ConfigError) -> str:
    """Return the first errors of a profile on one line, which names its file once."""
    first, *others = error.problems[:_MOST_SHOWN]
    shown = [str(first), *(str(problem).removeprefix(f"{first.file}:") for problem in others)]
    hidden = len(error.problems) - len(shown)
    return "; ".join([*shown, *([f"and {hidden} more"] if hidden else [])])
