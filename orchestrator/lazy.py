"""Imports on first use (PEP 562): slow third-party modules, as attributes."""

from __future__ import annotations

from importlib import import_module

# Not that of `typing`, which would slow the start of short commands.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import difflib
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    import jsonschema
    import referencing
    import zstandard

__all__ = ["difflib", "jsonschema", "lazy_names", "referencing", "zstandard"]


def lazy_names(package: str, modules: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Return a package's `__getattr__`, which imports public names on first use.

    Each name is imported from the module below the package that has it.
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{module_of[name]}"), name)

    return get


if not TYPE_CHECKING:  # type checkers see the imports above, and report unknown names

    def __getattr__(name: str) -> Any:
        """Import a third-party module."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return import_module(name)
