"""Expand placeholders such as {prompt_file}; doubled braces are literal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from adapters.options import check_argument

# One pass, with doubled braces first so that their content is not expanded.
_PLACEHOLDER: Final = re.compile(r"\{\{([a-z_]+)\}\}|\{([a-z_]+)\}")


def placeholder_names(arguments: Iterable[str]) -> list[str]:
    """Return the names of the placeholders in arguments, one per occurrence."""
    return [match[2] for argument in arguments for match in _PLACEHOLDER.finditer(argument) if match[2] is not None]


def check_placeholders(argument: str, known: Sequence[str]) -> str:
    """Return an argument. Raises ValueError if a placeholder is invalid or unknown."""
    for word in placeholder_names([argument]):
        if word not in known:
            listed = ", ".join(f"{{{name}}}" for name in known)
            raise ValueError(
                f"{{{word}}} is not a placeholder: use one of {listed}, or double its braces, {{{{{word}}}}}, for text"
            )
    return check_argument(argument)


def fill_placeholders(arguments: Iterable[str], values: Mapping[str, str]) -> tuple[str, ...]:
    """Return arguments with placeholders filled; values are not expanded again."""

    def fill(match: re.Match[str]) -> str:
        return values[match[2]] if match[2] is not None else f"{{{match[1]}}}"

    return tuple(_PLACEHOLDER.sub(fill, argument) for argument in arguments)
