"""Arguments with placeholders, such as {prompt_file}; doubled braces stand for the text of one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from adapters.options import check_argument

# One pass: doubled braces come first, so that what they protect is not looked at again.
_PLACEHOLDER: Final = re.compile(r"\{\{([a-z_]+)\}\}|\{([a-z_]+)\}")


def placeholder_names(arguments: Iterable[str]) -> list[str]:
    """Return the words of the placeholders in arguments, each as often as it stands there."""
    return [match[2] for argument in arguments for match in _PLACEHOLDER.finditer(argument) if match[2] is not None]


def check_placeholders(argument: str, known: Sequence[str]) -> str:
    """Return an argument with placeholders that are known; ValueError for what can be none, or has others."""
    for word in placeholder_names([argument]):
        if word not in known:
            listed = ", ".join(f"{{{name}}}" for name in known)
            raise ValueError(
                f"{{{word}}} is no placeholder: use one of {listed}, or double the braces, {{{{{word}}}}}, for the text"
            )
    return check_argument(argument)


def fill_placeholders(arguments: Iterable[str], values: Mapping[str, str]) -> tuple[str, ...]:
    """Return arguments with each placeholder filled once: what came in by one is left as it is."""

    def fill(match: re.Match[str]) -> str:
        return values[match[2]] if match[2] is not None else f"{{{match[1]}}}"

    return tuple(_PLACEHOLDER.sub(fill, argument) for argument in arguments)
