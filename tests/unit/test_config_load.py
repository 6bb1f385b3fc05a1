"""A valid file becomes a fully resolved run config."""

import json
from pathlib import Path

import pytest

from adapters.command.adapter import CommandAdapter
from orchestrator.config.load import load_config
from orchestrator.config.model import RunConfig, restore_adapters
from orchestrator.domain.settings.failures import RETRIED_BY_DEFAULT
from orchestrator.domain.settings.run_settings import (
    AdapterConfig,
    Backoff,
    SandboxSettings,
    SetupStep,
    TaskSpec,
    WorktreeSettings,
)
from orchestrator.errors import RefusedError
from tests.recorded_run import task_spec

TYPES = {"command": CommandAdapter}
SMALLEST = """\
version: 1
adapters:
  fixer: {use: command, argv: [fix]}
tasks:
  - {id: a, prompt: Fix it.}
"""
FULL = """\
%YAML 1.2
---
version: 1
repo: "code"
base: develop
target: team/work
capacity: 0x10
adapters:
  fixer:
    use: command
    argv: [python3, tools/fix.py, "{prompt_file}"]
    env: [HOME, MY_KEY]
  other:
    use: command
    argv: [other]
    env: {MODE: "on"}
    prompt: stdin
defaults:
  adapter: fixer
  timeout: 1h30m
  attempts: 5
  backoff: {initial: 500ms, factor: 3, max: 1h, jitter: false}
tasks:
  - id: models
    prompt: Add a User model.
  - id: api
    prompt_file: prompts/api.md
    needs: [models]
    adapter: other
    timeout: 2d
    attempts: 1
    backoff: {initial: 1s}
"""


def load(folder: Path, text: str) -> RunConfig:
    path = folder / "council.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, TYPES)


def test_minimal_file_gets_all_defaults(tmp_path: Path) -> None:
    """Every omitted key has its documented default in every task."""
    config = load(tmp_path, SMALLEST)
    assert (config.repo, config.is_url, config.base) == (str(tmp_path), False, "main")
    assert (config.target, config.capacity, config.path) == (None, 4, tmp_path / "council.yaml")
    [task] = config.tasks
    assert task == TaskSpec(
        id="a",
        prompt="Fix it.",
        needs=(),
        adapter="fixer",
        timeout=1800.0,
        attempts=3,
        backoff=Backoff(initial=2.0, factor=2.0, max=300.0, jitter=True),
        idle_timeout=600.0,
        retry_on=RETRIED_BY_DEFAULT,
        checks=(),
        checks_timeout=600.0,
        checks_env=(),
        max_file=50_000_000,
        priority=0,
        owns=(),
    )
    assert config.session_memory == 256 << 20
    assert config.sandbox == SandboxSettings()
    assert config.worktrees == WorktreeSettings(
        max=16,
        max_size=None,
        sparse=(),
        setup=(),
        before_run=(),
        after_run=(),
        teardown=(),
        hooks_timeout=600.0,
        env=(),
        copy=(),
        link=(),
        keep_ignored=(),
        ports=0,
    )
    assert config.adapters["fixer"].keep_ignored == ()


WORKTREES = """\
worktrees:
  max: 3
  max_size: 20GB
  sparse: [src, tests/unit/]
  setup:
    - make deps
    - run: pip install -r requirements.txt
      inputs: [requirements.txt]
      timeout: 90s
    - {run: "true"}
  before_run: [make reset]
  after_run: [make stop]
  teardown: [make down, docker compose down]
  hooks_timeout: 2m
  env: [PIP_INDEX_URL]
  copy: [.env, config/local.toml]
  link: [data/models/]
  keep_ignored: [node_modules, build/cache/]
  ports: 3
"""


def test_worktree_options_are_resolved(tmp_path: Path) -> None:
    """A step may be a bare command; `copy` and `link` are renamed in code; trailing slashes are dropped."""
    config = load(tmp_path, SMALLEST.replace("argv: [fix]", "argv: [fix], keep_ignored: [.fix/]") + WORKTREES)
    assert config.worktrees == WorktreeSettings(
        max=3,
        max_size=20_000_000_000,
        sparse=("src", "tests/unit"),
        setup=(
            SetupStep(run="make deps", inputs=(), timeout=600.0),
            SetupStep(run="pip install -r requirements.txt", inputs=("requirements.txt",), timeout=90.0),
            SetupStep(run="true"),
        ),
        before_run=("make reset",),
        after_run=("make stop",),
        teardown=("make down", "docker compose down"),
        hooks_timeout=120.0,
        env=("PIP_INDEX_URL",),
        copy=(".env", "config/local.toml"),
        link=("data/models",),
        keep_ignored=("node_modules", "build/cache"),
        ports=3,
    )
    assert config.adapters["fixer"].keep_ignored == (".fix",)


def test_task_overrides_defaults_key_by_key(tmp_path: Path) -> None:
    """Key by key, also within backoff; prompts are read from their files."""
    (tmp_path / "code").mkdir()
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/api.md").write_bytes("\ufeffÄ prompt\r\n".encode())
    config = load(tmp_path, FULL)
    models, api = config.tasks
    assert (config.repo, config.capacity, config.target) == (str(tmp_path / "code"), 16, "team/work")
    assert (models.adapter, models.timeout, models.attempts) == ("fixer", 5400.0, 5)
    assert models.backoff == Backoff(initial=0.5, factor=3, max=3600, jitter=False)
    assert (api.prompt, api.needs, api.adapter) == ("Ä prompt\r\n", ("models",), "other")
    assert (api.timeout, api.attempts) == (172800.0, 1)
    assert api.backoff == Backoff(initial=1.0, factor=3, max=3600, jitter=False)
    assert config.adapters["other"].options.model_dump(exclude_unset=True) == {
        "argv": ("other",),
        "env": {"MODE": "on"},
        "prompt": "stdin",
    }


def test_stored_config_is_restored(tmp_path: Path) -> None:
    """Tasks and adapters are equal after JSON, without the file."""
    config = load(tmp_path, SMALLEST.replace("argv: [fix]", "argv: [fix], env: {A: b}, keep_ignored: [x]") + WORKTREES)
    assert WorktreeSettings.model_validate(json.loads(config.worktrees.model_dump_json())) == config.worktrees
    for task in config.tasks:
        assert TaskSpec.model_validate(json.loads(task.model_dump_json())) == task
    for name, adapter in config.adapters.items():
        stored = AdapterConfig.model_validate_json(adapter.to_stored().model_dump_json())
        assert restore_adapters({name: stored}, TYPES) == {name: adapter}
    stored_run = json.loads(json.dumps(config.to_stored()["adapters"]["fixer"].model_dump(mode="json")))
    assert stored_run["options"]["argv"] == ["fix"]


def test_task_is_recorded_equally_by_each_process() -> None:
    """Set order differs between processes; the recorded order does not."""
    task = task_spec("a", "Fix it.").model_copy(update={"retry_on": RETRIED_BY_DEFAULT})
    recorded = task.model_dump_json()
    assert json.loads(recorded)["retry_on"] == sorted(RETRIED_BY_DEFAULT)
    assert TaskSpec.model_validate_json(recorded) == task


@pytest.mark.parametrize(
    ("stored", "fragment"),
    [
        (AdapterConfig(use="gone", options={}), "install the plugin"),
        (AdapterConfig(use="command", options={}), "version"),
        (AdapterConfig(use="command", options={"argv": 1}), "version"),
    ],
)
def test_incompatible_adapter_is_rejected(stored: AdapterConfig, fragment: str) -> None:
    """The error names the fix for a missing plugin or changed options."""
    with pytest.raises(RefusedError, match=fragment):
        restore_adapters({"fixer": stored}, TYPES)


@pytest.mark.parametrize(
    ("written", "is_url"),
    [
        ("https://host/x.git", True),
        ("ssh://git@host/x", True),
        ("git@host:x/y.git", True),
        ("file:///x", True),
        ("./a:b", False),
    ],
)
def test_repo_is_url_or_path(tmp_path: Path, written: str, is_url: bool) -> None:
    """A colon before the first slash makes a URL, kept as written; other values become absolute paths."""
    (tmp_path / "a:b").mkdir()
    config = load(tmp_path, f"repo: '{written}'\n{SMALLEST}")
    assert (config.is_url, config.repo) == (is_url, written if is_url else str(tmp_path / "a:b"))


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Independent of the current folder and of a byte order mark."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "code").mkdir()
    (tmp_path / "etc/p.md").write_text("Do.")
    text = SMALLEST.replace("prompt: Fix it.", "prompt_file: p.md")
    (tmp_path / "etc/council.yaml").write_bytes(b"\xef\xbb\xbf" + f"repo: ../code\n{text}".encode())
    monkeypatch.chdir(tmp_path)
    config = load_config(Path("etc/council.yaml"), TYPES)
    assert (config.repo, config.tasks[0].prompt) == (str(tmp_path / "code"), "Do.")
    assert config.path == tmp_path / "etc/council.yaml"


def test_plain_scalars_are_text_by_yaml_1_2(tmp_path: Path) -> None:
    texts = ["on", "yes", "NO", "2026-01-01", "1.2.3", "1_000", "12:30", "'7'", '"true"', "=", "+", "-x", "0b1", ".e1"]
    config = load(tmp_path, SMALLEST.replace("argv: [fix]", f"argv: [{', '.join(texts)}]"))
    assert config.adapters["fixer"].options.model_dump()["argv"] == tuple(text.strip("'\"") for text in texts)


def test_prompt_file_may_be_shared(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("Do.")
    text = SMALLEST.replace("prompt: Fix it.", "prompt_file: p") + "  - {id: b, prompt_file: p}\n"
    assert [task.prompt for task in load(tmp_path, text).tasks] == ["Do.", "Do."]


def test_models_are_frozen(tmp_path: Path) -> None:
    """A validated run config is immutable."""
    config = load(tmp_path, SMALLEST)
    with pytest.raises(ValueError, match="frozen"):
        config.capacity = 9  # type: ignore[misc]  # the mistake under test
    assert isinstance(config.adapters["fixer"], AdapterConfig)


def test_need_at_built_is_a_need_too(tmp_path: Path) -> None:
    """Also if the other one is listed by its id, or waits for the landing."""
    tasks = "".join(f"  - {{id: {name}, prompt: x}}\n" for name in "pqr")
    needs = "[p, {task: q, at: built}, {task: r, at: landed}]"
    task = load(tmp_path, SMALLEST + tasks + f"  - {{id: s, prompt: x, needs: {needs}}}\n").tasks[-1]
    assert (task.needs, task.built_needs) == (("p", "q", "r"), ("q",))


def test_long_chain_of_needs_loads(tmp_path: Path) -> None:
    """Neither depth nor number of tasks reaches the recursion limit."""
    tasks = "".join(f"  - {{id: t{i}, prompt: x, needs: [t{i + 1}]}}\n" for i in range(3000))
    config = load(tmp_path, SMALLEST + tasks + "  - {id: t3000, prompt: x}\n")
    assert len(config.tasks) == 3002


@pytest.mark.parametrize(
    ("written", "network", "hosts"),
    [
        ("on", True, ()),
        ("off", False, ()),
        (
            "{allow: [API.example.com., '*.Example.com:8443', '[::1]:80']}",
            False,
            ("api.example.com", "*.example.com:8443", "[::1]:80"),
        ),
    ],
)
def test_network_is_on_off_or_hosts(tmp_path: Path, written: str, network: bool, hosts: tuple[str, ...]) -> None:
    """Hosts are recorded in canonical form."""
    config = load(tmp_path, f"{SMALLEST}network: {written}\n")
    assert (config.sandbox.has_network, config.sandbox.hosts) == (network, hosts)
    assert SandboxSettings.model_validate(config.sandbox.model_dump(mode="json")) == config.sandbox
