"""Built-in stores: each is registered, tested by the contract suite, and documented."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, get_type_hints

import pytest

from orchestrator.plugins import load_plugins
from orchestrator.protocols import Store
from orchestrator.state import stores
from orchestrator.system.clock import Clock
from orchestrator.testing.store_contract import StoreContract
from tests.contract import test_stores

PLUGIN = "orchestrator/state/stores/plugin.py"
SUITE = "tests/contract/test_stores.py"
CONFIGURATION = (Path(__file__).parents[2] / "docs/configuration.md").read_text()
REGISTERED = load_plugins({"COUNCIL_PLUGINS": ""}).stores
OPERATIONS = {name for name in vars(Store) if not name.startswith("_")}


def _modules() -> Sequence[ModuleType]:
    return [import_module(f"{stores.__name__}.{found.name}") for found in iter_modules(stores.__path__)]


def _is_store_type(function: Any) -> bool:
    """Whether a function has the signature of `StoreType`."""
    parameters = inspect.signature(function).parameters
    hints = get_type_hints(inspect.unwrap(function))
    opened = hints.pop("return", None)
    is_opened = hasattr(function, "__wrapped__") or opened == AbstractAsyncContextManager[Store]
    return list(parameters) == ["url", "clock"] and hints == {"url": str, "clock": Clock} and is_opened


def _suites() -> dict[str, type[StoreContract]]:
    """Return the first suite of the contract for each scheme."""
    found: dict[str, type[StoreContract]] = {}
    for suite in vars(test_stores).values():
        if isinstance(suite, type) and issubclass(suite, StoreContract) and hasattr(suite, "scheme"):
            found.setdefault(suite.scheme, suite)
    return found


@pytest.mark.parametrize("module", _modules(), ids=lambda module: module.__name__.rpartition(".")[2])
def test_store_type_of_a_module_is_registered(module: ModuleType) -> None:
    """A function that opens a store is registered for a scheme."""
    found = [one for _, one in inspect.getmembers(module, inspect.isfunction) if one.__module__ == module.__name__]
    for function in found:
        if _is_store_type(function):
            assert function in REGISTERED.values(), (
                f"{module.__name__}.{function.__name__} opens a store: register it in {PLUGIN}"
            )


@pytest.mark.parametrize("scheme", REGISTERED)
def test_registered_scheme_has_a_contract_suite_and_documentation(scheme: str) -> None:
    assert scheme in _suites(), f"{SUITE}: add a subclass of StoreContract with `scheme = {scheme!r}`"
    section = CONFIGURATION.partition("\n## `state`\n")[2].partition("\n## ")[0]
    assert f"`{scheme}:" in section, f"docs/configuration.md, section `state`: add `{scheme}:` to the row `url`"


async def test_store_class_of_a_module_is_tested_and_registered() -> None:
    """Each class with all operations of `Store` is opened by the suite of a registered scheme."""
    found = {
        one
        for module in _modules()
        for _, one in inspect.getmembers(module, inspect.isclass)
        if one.__module__ == module.__name__ and all(hasattr(one, name) for name in OPERATIONS)
    }
    tested = set()
    for scheme, suite in _suites().items():
        assert scheme in REGISTERED, f"{SUITE} tests the scheme {scheme!r}: register it in {PLUGIN}"
        async with suite().open_store() as store:
            tested.add(type(store))
    assert found, "no module of orchestrator/state/stores has a store"
    for one in found - tested:
        pytest.fail(
            f"{one.__module__}.{one.__name__}: register it in {PLUGIN}, and add it with its `scheme` to {SUITE}"
        )
