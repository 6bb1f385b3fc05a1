"""Create and execute runs in this process, and perform requests on them.

`RunExecutor` runs tasks, `RunController` performs requests of a person, `perform_dry_run` checks a run without starting
it. Each is imported on first use, because commands that only show a run need none, and those that start one not all.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.api.execution.control import RunController
    from orchestrator.api.execution.creation import create_merge_run, create_run
    from orchestrator.api.execution.dry_run import perform_dry_run
    from orchestrator.api.execution.executor import RunExecutor

__all__ = ["RunController", "RunExecutor", "create_merge_run", "create_run", "perform_dry_run"]

_MODULES = {
    "RunController": "control",
    "RunExecutor": "executor",
    "create_merge_run": "creation",
    "create_run": "creation",
    "perform_dry_run": "dry_run",
}

if not TYPE_CHECKING:  # type checkers see the imports above, and report unknown names

    def __getattr__(name: str) -> Any:
        """Import a public name (PEP 562)."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
