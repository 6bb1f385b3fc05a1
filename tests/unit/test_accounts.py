"""Accounts of adapters: their names, the variables and logins of their sessions, and errors in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.accounts import account_secrets
from orchestrator.config.adapters import make_trial_request
from orchestrator.config.load import load_value
from orchestrator.config.model import RunConfig, make_adapters
from orchestrator.config.permissions import list_permission_requests
from orchestrator.engine.diagnostics.programs import probe_adapters
from orchestrator.errors import ConfigError
from orchestrator.plugins import load_plugins
from orchestrator.protocols import SessionCommand, SessionEnd
from orchestrator.sessions.setup.environment import passed_variables

TYPES = load_plugins().adapters
TWO = {"use": "claude-code", "accounts": {"work": {"ANTHROPIC_API_KEY": "$WORK_LOGIN"}, "private": {}}}
SHELL = {"use": "command", "argv": ["sh", "{prompt_file}"]}


def load(folder: Path, adapters: dict[str, Any], *tasks: dict[str, Any], **settings: Any) -> RunConfig:
    written = tasks or ({"id": "t", "prompt": "x", "adapter": next(iter(adapters))},)
    value = {"version": 1, "adapters": adapters, "tasks": [{"prompt": "x", **one} for one in written], **settings}
    return load_value(value, folder, TYPES)


def command(config: RunConfig, name: str) -> SessionCommand:
    return make_adapters(config.adapters, TYPES)[name].command(make_trial_request("t", "x", Path("/home-of-task")))


def test_accounts_replace_each_other_everywhere(tmp_path: Path) -> None:
    """In their order, before other adapters; a task can name a single account."""
    config = load(
        tmp_path,
        {"claude": TWO, "other": SHELL},
        {"id": "all", "adapter": "claude", "fallback": ["other"]},
        {"id": "one", "adapter": "claude@private"},
        {"id": "last", "adapter": "other", "fallback": ["claude"]},
        {"id": "phases", "adapter": "other", "workflow": "w"},
        workflows={"w": [{"plan": {"adapter": "claude"}}, "build"]},
    )
    assert [*config.adapters] == ["claude@work", "claude@private", "other"]
    assert {task.id: task.adapters for task in config.tasks} == {
        "all": ("claude@work", "claude@private", "other"),
        "one": ("claude@private",),
        "last": ("other", "claude@work", "claude@private"),
        "phases": ("other",),
    }
    [plan, build] = config.workflows["w"]
    assert (plan.adapter, plan.fallback, build.adapter) == ("claude@work", ("claude@private",), None)
    assert load(tmp_path, {"claude": TWO}, {"id": "t"}).tasks[0].adapters == ("claude@work", "claude@private")


def test_account_gets_its_key_under_the_name_that_the_program_reads(tmp_path: Path) -> None:
    """And none of another account; the file and the command have only the name."""
    environ = {"WORK_LOGIN": "its-own-value", "CLAUDE_CODE_OAUTH_TOKEN": "that-of-another", "USER": "me"}
    config = load(tmp_path, {"claude": TWO})
    work = command(config, "claude@work")
    assert passed_variables(work, environ) == {"ANTHROPIC_API_KEY": "its-own-value", "USER": "me"}
    private = passed_variables(command(config, "claude@private"), environ)
    assert private == {"CLAUDE_CODE_OAUTH_TOKEN": "that-of-another", "USER": "me"}
    assert passed_variables(work, {"ANTHROPIC_API_KEY": "that-of-another"}) == {}
    assert account_secrets(config.adapters.values(), environ) == {"its-own-value"}
    assert "its-own-value" not in repr(work)
    assert list_permission_requests(config, tmp_path)[-1] == (
        "adapters.claude@work.accounts: $WORK_LOGIN (passed from your environment as ANTHROPIC_API_KEY: sessions use "
        "the account there)"
    )


@pytest.mark.parametrize(
    ("use", "variable", "login", "at"),
    [
        ("claude-code", "CLAUDE_CONFIG_DIR", ".credentials.json", ".credentials.json"),
        ("codex", "CODEX_HOME", "auth.json", "auth.json"),
        ("gemini", "GEMINI_CLI_HOME", ".gemini/oauth_creds.json", ".gemini/oauth_creds.json"),
        ("opencode", "XDG_DATA_HOME", "share/opencode/auth.json", "opencode/auth.json"),
        ("qwen-code", "HOME", ".qwen/oauth_creds.json", ".qwen/oauth_creds.json"),
    ],
)
def test_account_has_its_login_in_its_folder(tmp_path: Path, use: str, variable: str, login: str, at: str) -> None:
    """With a home of the task by a link, otherwise by the variable that moves the folder."""
    entry = {"use": use, "accounts": {"second": {variable: str(tmp_path)}}}
    if use != "qwen-code":
        shared = command(load(tmp_path, {"a": {**entry, "home": "shared"}}), "a@second")
        assert shared.env[variable] == str(tmp_path)
        assert variable not in shared.pass_env
        assert tmp_path in shared.readable
    own = command(load(tmp_path, {"a": {**entry, "home": "own"}}), "a@second")
    assert own.home is not None
    assert own.home.links[login] == str(tmp_path / at)
    assert login in own.home.renewed
    assert own.env[variable].startswith("/home-of-task")


def test_failed_login_names_the_account(tmp_path: Path) -> None:
    """And how to use it manually."""
    adapters = {"claude": {"use": "claude-code", "accounts": {"second": {"CLAUDE_CONFIG_DIR": str(tmp_path)}}}}
    adapter = make_adapters(load(tmp_path, adapters).adapters, TYPES)["claude@second"]
    failed = adapter.verdict(SessionEnd(1, None, 0.0, "", "Invalid API key · Please run /login"))
    account = f"(account 'second', with CLAUDE_CONFIG_DIR={tmp_path})"
    assert failed is not None
    assert failed.reason.endswith(account)
    assert adapter.programs()[0].log_in.endswith(account)


async def test_each_account_is_probed_with_its_own_login(tmp_path: Path) -> None:
    """A program that is ready only with the key of one account."""
    program = tmp_path / "bin" / "claude"
    program.parent.mkdir()
    login = 'test -e "$CLAUDE_CONFIG_DIR/.credentials.json"'
    program.write_text(f'#!/bin/sh\n[ "$1" = auth ] || {{ echo 2.1.0; exit; }}\n{login}\n')
    program.chmod(0o755)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    (tmp_path / "first" / ".credentials.json").write_text("{}")
    accounts = {name: {"CLAUDE_CONFIG_DIR": str(tmp_path / name)} for name in ("first", "second")}
    config = load(tmp_path, {"claude": {"use": "claude-code", "accounts": accounts}})
    environ = {"PATH": f"{program.parent}:/usr/bin:/bin", "HOME": str(tmp_path)}
    found = await probe_adapters(make_adapters(config.adapters, TYPES), environ)
    assert {name: status.programs[0].ready for name, status in found.items()} == {
        "claude@first": True,
        "claude@second": False,
    }


@pytest.mark.parametrize(
    ("accounts", "message"),
    [
        (
            {"a": {"KEY": "sk-ant-looks-like-a-key"}},
            "a value of an account is neither one of your variables nor a folder",
        ),
        ({"a": {"KEY": "/no/such/folder"}}, "there is no folder '/no/such/folder'"),
        ({"a": {"1KEY": "$KEY"}}, "'1KEY' is not a valid variable name"),
        ({"a@b": {}}, "'a@b' can't be a name"),
        ({"a": "$KEY"}, "a is the text '$KEY': use a mapping of keys and values"),
    ],
)
def test_keys_and_missing_folders_are_errors(tmp_path: Path, accounts: Any, message: str) -> None:
    """Without the key in the message."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, {"claude": {"use": "claude-code", "accounts": accounts}})
    assert message in str(caught.value)
    assert "sk-ant" not in str(caught.value)


def test_unknown_account_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no adapter 'claude@wrk'.*did you mean 'claude@work'"):
        load(tmp_path, {"claude": TWO}, {"id": "t", "adapter": "claude@wrk"})
