"""Sources of worktrees are checked before a run starts, and worktree options are recorded with it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters.command.adapter import CommandAdapter
from orchestrator import AdapterSettings, Config, Council, SetupStep, Task, WorktreeSettings
from orchestrator.config.load import load_config
from orchestrator.config.model import restore_adapters
from orchestrator.engine.state.records import read_run
from orchestrator.engine.worktree_sources import BaseCommit, check_worktree_sources
from orchestrator.errors import RefusedError
from orchestrator.repo.git.command import Git
from orchestrator.repo.source.run_repository import find_run_repository
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock
from tests.conftest import Repository

ONE: list[dict[str, Any]] = [{"id": "a", "prompt": "write a.txt a"}]
COPY = WorktreeSettings(copy=("secret",))
LINK = WorktreeSettings(link=("deep/data",))


async def find_rejection(repository: Repository, worktrees: WorktreeSettings, folder: str = ".") -> str | None:
    """Return the reason why a run with such worktrees is rejected, None if it is not."""
    environ = repository.environ
    site = await find_run_repository(str(repository.top / folder), is_url=False, environ=environ)
    assert site.repository is not None
    base = BaseCommit("main", "refs/heads/main", Git(site.repository.git_dir, as_user=True, environ=environ))
    try:
        await check_worktree_sources(worktrees, base, site.repository, [Path(environ["COUNCIL_HOME"])])
    except RefusedError as error:
        return str(error)
    return None


def _write(path: Path, text: str = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


async def test_existing_sources_are_accepted(repository: Repository, tmp_path: Path) -> None:
    """Untracked files and folders, ignored or not, also through a link as the last component."""
    repository.commit({".gitignore": ".env\n", "docs/guide/a.md": "a\n", "app/[id]/x y.js": "", "deep/x": "x"})
    outside = tmp_path / "models"
    _write(outside / "small.bin")
    _write(repository.top / ".env")
    _write(repository.top / "docs/guide/private/notes")
    (repository.top / "deep/data").symlink_to(outside)
    found = await find_rejection(
        repository,
        WorktreeSettings(
            sparse=("docs/guide", "app/[id]"),
            setup=(SetupStep(run="true", inputs=("README.md", "app/[id]/x y.js")), SetupStep(run="true")),
            copy=(".env", "docs/guide/private"),
            link=("deep/data",),
            keep_ignored=("nowhere",),
        ),
    )
    assert found is None


def _outwards(repository: Repository, name: str, to: str | Path) -> None:
    (repository.top / name).symlink_to(to)


def _nothing(_: Repository) -> None:
    pass


def _committed_file_in_the_way(repository: Repository) -> None:
    repository.commit({"deep": "a file"})
    (repository.top / "deep").unlink()
    _write(repository.top / "deep/data")


def _dangling(repository: Repository) -> None:
    _outwards(repository, "secret", "nowhere")


def _through_a_link(repository: Repository) -> None:
    _write(repository.top.parent / "elsewhere/data")
    _outwards(repository, "deep", "../elsewhere")


@pytest.mark.parametrize(
    ("prepare", "worktrees", "fragment"),
    [
        (_nothing, COPY, "`worktrees.copy`: 'secret' does not exist in "),
        (_nothing, LINK, "`worktrees.link`: 'deep/data' does not exist in "),
        (lambda it: it.commit({"secret": "x"}), COPY, "'secret' is already in 'main': remove it from `worktrees.copy`"),
        (lambda it: it.commit({"deep/data/x": "x"}), LINK, "'deep/data' is already in 'main': remove it from `worktr"),
        (
            _committed_file_in_the_way,
            LINK,
            "'deep' is not a folder in 'main': remove 'deep/data' from `worktrees.link`",
        ),
        (_dangling, COPY, "'secret' is neither a file nor a folder: remove it"),
        (lambda it: os.mkfifo(it.top / "secret"), COPY, "'secret' is neither a file nor a folder"),
        (_through_a_link, LINK, "'deep/data' goes through the link 'deep': name 'deep' itself"),
        (lambda it: _outwards(it, "secret", "."), COPY, "'secret' contains files hidden from sessions"),
        (lambda it: _outwards(it, "secret", ".git/config"), COPY, "'secret' contains files hidden from sessions"),
        (lambda it: _write(it.top / ".council/x"), WorktreeSettings(link=(".council",)), "hidden from sessions"),
        (lambda it: _outwards(it, "secret", it.top.parent), COPY, "'secret' contains files hidden from sessions"),
        (_nothing, WorktreeSettings(sparse=("src", "lib")), "`worktrees.sparse`: folder 'lib' not found in 'main'"),
        (_nothing, WorktreeSettings(sparse=("README.md",)), "folder 'README.md' not found in 'main'"),
        (lambda it: _write(it.top / "new/x"), WorktreeSettings(sparse=("new",)), "folder 'new' not found"),
        (
            _nothing,
            WorktreeSettings(setup=(SetupStep(run="true", inputs=("lock",)),)),
            "`worktrees.setup`: file 'lock' not found in 'main': list committed files as `inputs`",
        ),
        (_nothing, WorktreeSettings(setup=(SetupStep(run="true", inputs=("src",)),)), "file 'src' not found"),
    ],
)
async def test_invalid_sources_are_rejected(
    repository: Repository, prepare: Callable[[Repository], object], worktrees: WorktreeSettings, fragment: str
) -> None:
    prepare(repository)
    found = await find_rejection(repository, worktrees)
    assert found is not None
    assert fragment in found


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
async def test_unreadable_sources_are_rejected(repository: Repository) -> None:
    _write(repository.top / "secret")
    (repository.top / "secret").chmod(0)
    assert "'secret' can't be read" in (await find_rejection(repository, COPY) or "")


async def test_all_mistakes_are_reported_at_once(repository: Repository) -> None:
    worktrees = WorktreeSettings(sparse=("lib",), copy=("README.md", "secret"), link=("data",))
    found = await find_rejection(repository, worktrees) or ""
    for fragment in (
        "folder 'lib' not found",
        "'README.md' is already in 'main'",
        "'secret' does not exist",
        "'data' does not exist",
    ):
        assert found.count(fragment) == 1
    assert found.endswith("fix these under `worktrees:`")


async def test_bare_repository_has_nothing_to_copy(repository: Repository) -> None:
    repository.git("clone", "--quiet", "--bare", ".", "../bare.git")
    assert await find_rejection(repository, WorktreeSettings(sparse=("src",)), "../bare.git") is None
    assert "the repository has none: remove them, or set `repo` to a checkout" in (
        await find_rejection(repository, COPY, "../bare.git") or ""
    )


@pytest.mark.extended
async def test_doctor_checks_the_sources(repository: Repository) -> None:
    """Only if a file configures worktrees; reasons to reject a run are problems."""

    def level(**settings: Any) -> str | None:
        reported = repository.council("doctor", str(repository.configure(ONE, **settings)), "--json").result["findings"]
        return next((str(one["level"]) for one in reported if one["name"] == "worktrees"), None)

    assert level() is None
    assert level(worktrees={"copy": ["secret"]}) == "problem"
    _write(repository.top / "secret")
    assert level(worktrees={"copy": ["secret"]}) == "ok"


async def test_run_records_its_worktree_options(repository: Repository) -> None:
    """A resume knows them without the file, including the kept files of each adapter."""
    _write(repository.top / "secret")
    worktrees = {"max": 7, "setup": ["true", {"run": "make", "inputs": ["README.md"]}], "copy": ["secret"], "ports": 2}
    path = repository.configure(ONE, worktrees=worktrees)
    path.write_text(path.read_text().replace('"use": "command"', '"use": "command", "keep_ignored": [".cache"]'))
    config = load_config(path, {"command": CommandAdapter})
    async with Council.open(path, environ=repository.environ) as council:
        run = await council.runs.create()
    async with FileStore.open(repository.log, SystemClock()) as store:
        document = await read_run(store, run)
    assert config.worktrees.copied == ("secret",)
    assert WorktreeSettings.model_validate(document.worktrees) == config.worktrees
    restored = restore_adapters(document.adapters, {"command": CommandAdapter})["fake"]
    assert restored == config.adapters["fake"]
    assert restored.keep_ignored == (".cache",)


async def test_worktree_options_work_from_python(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """Typed objects equal a file, with numbers for durations and sizes."""
    monkeypatch.chdir(repository.top)
    described = Config(
        version=1,
        adapters={"x": AdapterSettings(use="command", keep_ignored=("y/",), argv=["sh"])},
        worktrees=WorktreeSettings(
            max_size=1000,
            setup=(SetupStep(run="make"), SetupStep(run="true", timeout=1.5)),
            copy=(".env",),
            link=("data/",),
        ),
        tasks=(Task(id="a", prompt="p"),),
    )
    async with Council.open(described, environ=repository.environ) as council:
        assert council.config is not None
        assert council.config.adapters["x"].keep_ignored == ("y",)
        assert council.config.worktrees == WorktreeSettings(
            max_size=1000,
            setup=(SetupStep(run="make"), SetupStep(run="true", timeout=1.5)),
            copy=(".env",),
            link=("data",),
        )
