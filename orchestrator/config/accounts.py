"""Accounts of an adapter: the variables and folders under which its program uses one of them.

    claude:
      use: claude-code
      accounts:
        work: {ANTHROPIC_API_KEY: $WORK_KEY}
        private: {CLAUDE_CONFIG_DIR: ~/.claude-private}

`expand_accounts` (`orchestrator.config.model`) makes this entry two adapters that replace each other, `claude@work` and
`claude@private`. So each account has its own cooldown, capacity, usage and failures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from orchestrator.domain.runs.outcome import Failed
from orchestrator.domain.security.secrets import secret_values
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.domain.settings.run_settings import AdapterConfig
from orchestrator.protocols import (
    Adapter,
    Capability,
    Program,
    SessionCommand,
    SessionEnd,
    SessionEvent,
    SessionHome,
    SessionRequest,
    SettingsOverlay,
)

#: Marks the name of a variable in place of a folder.
VARIABLE_MARK: Final = "$"


def account_secrets(configs: Iterable[AdapterConfig], environ: Mapping[str, str]) -> frozenset[str]:
    """Return the secrets that sessions get from the user's variables, regardless of their names."""
    accounts = (variables for config in configs for variables in config.accounts.values())
    return frozenset[str]().union(
        *(
            secret_values({name: environ.get(value.removeprefix(VARIABLE_MARK), "")})
            for variables in accounts
            for name, value in variables.items()
            if value.startswith(VARIABLE_MARK)
        )
    )


class AccountAdapter:
    """Runs the program of an adapter with one of its accounts."""

    def __init__(self, adapter: Adapter, account: str, variables: Mapping[str, str]) -> None:
        """Create the adapter of an account; `variables` maps each to a folder, or to `$NAME`."""
        self._adapter, self._account, self._variables = adapter, account, variables
        self._sources = {
            name: value.removeprefix(VARIABLE_MARK)
            for name, value in variables.items()
            if value.startswith(VARIABLE_MARK)
        }
        self._folders = {name: value for name, value in variables.items() if name not in self._sources}

    def capabilities(self) -> frozenset[Capability]:
        """Return those of the adapter."""
        return self._adapter.capabilities()

    def programs(self) -> Sequence[Program]:
        """Return those of the adapter; a missing login has the account in its remedy."""
        return [
            replace(program, log_in=self._explain(program.log_in or f"log in to {program.name}"))
            for program in self._adapter.programs()
        ]

    def command(self, request: SessionRequest) -> SessionCommand:
        """Return the command with the account's variables, and without the keys of other accounts."""
        command = self._adapter.command(request)
        keys = {key for program in self._adapter.programs() for key in program.keys} if self._variables else ()
        return replace(
            command,
            env={**self._folders, **{name: value for name, value in command.env.items() if name not in self._sources}},
            pass_env=[name for name in command.pass_env if name not in keys and name not in self._variables],
            renamed_env={**command.renamed_env, **self._sources},
            readable=(*command.readable, *map(Path, self._folders.values())),
            home=None if command.home is None else self._relocate(command.home),
        )

    def parse(self, line: str) -> Sequence[SessionEvent]:
        """Return the events in a line."""
        return self._adapter.parse(line)

    def verdict(self, end: SessionEnd) -> Failed | None:
        """Return the adapter's verdict; a failed login names the account."""
        failed = self._adapter.verdict(end)
        if failed is None or failed.failure is not FailureClass.AUTH:
            return failed
        return replace(failed, reason=self._explain(failed.reason))

    def _explain(self, remedy: str) -> str:
        where = ", ".join(f"{name}={value}" for name, value in self._variables.items())
        return f"{remedy} (account {self._account!r}{f', with {where}' if where else ''})"

    def _relocate(self, home: SessionHome) -> SessionHome:
        """Return a home whose links and settings lead to the account's folders."""
        defaults = sorted((default, name) for name, default in {"HOME": "~", **home.folders}.items())
        moved = [(default, self._folders[name]) for default, name in reversed(defaults) if name in self._folders]

        def move(path: str) -> str:
            found = next(((old, new) for old, new in moved if path.startswith(f"{old}/")), None)
            return path if found is None else path.replace(*found, 1)

        return replace(
            home,
            links={name: move(path) for name, path in home.links.items()},
            settings={name: _at(overlay, move(overlay.file)) for name, overlay in home.settings.items()},
        )


def _at(overlay: SettingsOverlay, file: str) -> SettingsOverlay:
    return replace(overlay, file=file)
