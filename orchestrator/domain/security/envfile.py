"""Parse files of NAME=value lines, such as `.env` and `.envrc`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

_NAME: Final = r"^[ \t]*(?:export[ \t]+)?([A-Za-z_][\w.-]*)[ \t]*=[ \t]*"
_QUOTED: Final = re.compile(_NAME + r"""(?:"((?:[^"\\]|\\.)*)"|'([^']*)')""", re.MULTILINE | re.DOTALL)
_PLAIN: Final = re.compile(_NAME + r"([^\r\n]*)", re.MULTILINE)
_ESCAPE: Final = re.compile(r"\\(.)", re.DOTALL)
_ESCAPED: Final = {"n": "\n", "r": "\r", "t": "\t"}


def parse_env_values(text: str) -> Iterator[tuple[str, str]]:
    """Yield names with all possible values, because programs use different rules.

    Quoted values, which may span lines, are yielded with and without resolved escapes; other values up to the end of
    the line, and up to a comment.
    """
    for match in _QUOTED.finditer(text):
        name, double, single = match.groups()
        yield name, single if double is None else double
        if double is not None:
            yield name, _ESCAPE.sub(lambda escape: _ESCAPED.get(escape[1], escape[1]), double)
    for match in _PLAIN.finditer(text):
        name, value = match.groups()
        if not value.startswith(('"', "'")):
            yield name, value.strip()
            yield name, re.split(r"\s#", value)[0].strip()
