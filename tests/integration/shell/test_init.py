"""`council init`: the written file loads and has the detected tools, and no user file changes."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.config.load import load_config
from orchestrator.config.model import RunConfig
from orchestrator.engine.diagnostics.initialization import write_file
from orchestrator.errors import RefusedError
from orchestrator.plugins import load_plugins
from tests.conftest import FAKE_CLI, CommandResult, Repository
from tests.fake_programs import FakePrograms, install_fake_programs
from tests.sandboxes import needs_sandbox


@pytest.fixture
def fakes(tmp_path: Path, repository: Repository) -> FakePrograms:
    return install_fake_programs(tmp_path, repository)


def load(path: Path) -> RunConfig:
    """Load a file that needs only what the package includes."""
    return load_config(path, load_plugins().adapters)


def init(repository: Repository, *arguments: str) -> dict[str, Any]:
    """Write a file; return the result."""
    ended = repository.council("init", *arguments, "--json")
    assert ended.code == 0, ended.stdout
    return ended.result


def refusal(repository: Repository, *arguments: str) -> str:
    """Return the reason why nothing was written."""
    ended = repository.council("init", *arguments, "--json")
    assert (ended.code, ended.result["status"]) == (2, "refused")
    return f"{ended.result['error']}: {ended.result['remedy']}"


def test_init_without_any_cli_works(repository: Repository, fakes: FakePrograms) -> None:
    """A template for any program; it loads, and git sees that file alone."""
    result = init(repository)
    path = repository.top / "council.yaml"
    assert (result["path"], result["adapters"], result["checks"]) == (str(path), [], [])
    config = load(path)
    assert (config.repo, config.base, config.target) == (os.path.realpath(repository.top), "main", None)
    assert config.adapters["my-cli"].use == "command"
    assert repository.git("status", "--porcelain") == "?? council.yaml"
    assert "use: command" in path.read_text()


@pytest.mark.extended
def test_found_tools_are_used(repository: Repository, fakes: FakePrograms) -> None:
    """Adapters of installed programs, the ready one first, and the repository's own tests."""
    fakes.add("alpha", "echo alpha 2.1")
    fakes.add("beta", 'case "$1" in version) echo 1.0;; *) exit 0;; esac')
    fakes.add("make", "exit 0")
    repository.commit({"Makefile": "test:\n\ttrue\n"})
    result = init(repository)
    assert [one["use"] for one in result["adapters"]] == ["beta-code", "alpha-code"]
    assert (result["checks"], result["declared_in"]) == (["make test"], "Makefile")
    value = yaml.safe_load((repository.top / "council.yaml").read_text())
    assert value["adapters"] == {"beta-code": {"use": "beta-code"}, "alpha-code": {"use": "alpha-code"}}
    assert value["defaults"]["adapter"] == "beta-code"
    assert value["defaults"]["checks"] == ["make test"]
    found = repository.council("doctor", "--json").result["findings"]
    assert {one["level"] for one in found if one["name"] == "file"} == {"ok"}
    # A login check: an adapter without a login comes last, with the fix.
    fakes.add("beta", "exit 1")
    text = repository.council("init", "--force").stdout
    assert text.index("alpha-code") < text.index("beta-code")
    assert "→ run `beta login`" in text
    assert "run `beta login`" in (repository.top / "council.yaml").read_text()


def test_found_clis_may_all_run_commands(repository: Repository, fakes: FakePrograms) -> None:
    """Those that would only change files by default get a mode; the file loads."""
    for name in ("claude", "codex", "gemini"):
        fakes.add(name, f"echo {name} 2.1.0")
    init(repository)
    options = {name: one.options for name, one in load(repository.top / "council.yaml").adapters.items()}
    assert options["claude-code"].permission_mode == "bypassPermissions"
    assert options["gemini"].approval_mode == "yolo"
    assert options["codex"].sandbox == "none"


def test_next_command_is_printed(repository: Repository, fakes: FakePrograms) -> None:
    """The commands have the file's name if it is not the default."""
    text = repository.council("init").stdout
    assert [line.split("  ")[-1].strip() for line in text.splitlines() if line.startswith("next")] == [
        "council doctor",
        "council run --dry-run",
        "council run",
    ]
    assert init(repository, "an other.yaml")["next"][0] == "council doctor 'an other.yaml'"


def test_existing_file_is_kept(repository: Repository, fakes: FakePrograms) -> None:
    """Without --force nothing is replaced, whatever it is; with it a file is, a folder is not."""
    path = repository.top / "council.yaml"
    path.write_text("mine\n")
    assert "replace it with --force" in refusal(repository)
    assert path.read_text() == "mine\n"
    init(repository, "--force")
    assert load(path).tasks
    path.unlink()
    path.symlink_to("/nowhere")
    assert "already exists" in refusal(repository)
    path.unlink()
    path.mkdir()
    assert "is a folder" in refusal(repository, "--force")
    assert sorted(one.name for one in repository.top.iterdir() if "new" in one.name) == []


def test_unwritable_settings_do_not_fail_it(repository: Repository, fakes: FakePrograms) -> None:
    """The file exists by then, and a repeated command would need --force."""
    repository.environ["XDG_CONFIG_HOME"] = "/dev/null/config"
    ended = repository.council("init")
    assert (ended.code, (repository.top / "council.yaml").exists()) == (0, True), ended
    assert "not confirmed, `council run` asks about it: /dev/null/config/council/trust.json" in ended.stderr


@pytest.mark.extended
def test_file_can_be_written_elsewhere(repository: Repository, fakes: FakePrograms, tmp_path: Path) -> None:
    """Relative to the current folder; the file has the repository's path relative to it."""
    inner = replace(repository, top=repository.top / "src")
    assert init(inner)["path"] == str(repository.top / "council.yaml")
    init(inner, "deep.yaml")
    assert load(repository.top / "src" / "deep.yaml").repo == os.path.realpath(repository.top)
    init(inner, str(tmp_path / "outside.yaml"))
    assert load(tmp_path / "outside.yaml").repo == os.path.realpath(repository.top)
    assert "there is no folder" in refusal(repository, "no/such/folder.yaml")


@pytest.mark.extended
def test_unusual_names_are_quoted(repository: Repository, fakes: FakePrograms, tmp_path: Path) -> None:
    """Spaces, quotes, colons and other scripts in paths and branches load unchanged."""
    top = tmp_path / "a 'b' \"c\" # ü: ö"
    repository.top.rename(top)
    odd = replace(repository, top=top)
    odd.git("switch", "--quiet", "--create", "wörk/it's-#1")
    init(odd)
    config = load(top / "council.yaml")
    assert (config.repo, config.base) == (os.path.realpath(top), "wörk/it's-#1")
    init(odd, str(tmp_path / 'outside: "x".yaml'))
    assert load(tmp_path / 'outside: "x".yaml').repo == os.path.realpath(top)


@pytest.mark.extended_variants
@pytest.mark.parametrize("name", ["on", "null", "1.0", "0x10"])
def test_ambiguous_branches_are_quoted(name: str, repository: Repository, fakes: FakePrograms) -> None:
    """A branch's name is text, whatever YAML would parse it as."""
    repository.git("branch", "--move", name)
    assert init(repository)["base"] == name
    assert load(repository.top / "council.yaml").base == name


@pytest.mark.extended
def test_base_without_a_branch_is_chosen(repository: Repository, fakes: FakePrograms, tmp_path: Path) -> None:
    """With a detached HEAD: the default branch of `origin`, or one with a usual name."""
    repository.git("branch", "other")
    repository.git("switch", "--quiet", "--detach")
    assert init(repository)["base"] == "main"
    repository.git("switch", "--quiet", "other")
    clone = tmp_path / "clone"
    repository.git("clone", "--quiet", str(repository.top), str(clone))
    cloned = replace(repository, top=clone)
    cloned.git("branch", "main")
    cloned.git("switch", "--quiet", "--detach")
    assert init(cloned)["base"] == "other"


def test_unusable_repository_is_rejected(repository: Repository, fakes: FakePrograms, tmp_path: Path) -> None:
    """Outside of a repository, without a commit, in a bare one: each has its error, and nothing is written."""
    for name, words in (("plain", "is not in a git repository"), ("empty", "has no commits yet"), ("bare", "bare")):
        top = tmp_path / name
        top.mkdir()
        if name != "plain":
            repository.git("init", "--quiet", *(["--bare"] if name == "bare" else []), str(top))
        before = sorted(top.iterdir())
        assert words in refusal(replace(repository, top=top))
        assert sorted(top.iterdir()) == before


@pytest.mark.extended
def test_chosen_adapter_is_used(repository: Repository, fakes: FakePrograms) -> None:
    """Installed or not; one that needs options, or is unknown, is rejected with suggestions."""
    fakes.add("beta", "echo 1.0")
    result = init(repository, "--adapter", "alpha-code")
    assert [(one["use"], one["programs"][0]["path"]) for one in result["adapters"]] == [("alpha-code", None)]
    init(repository, "--adapter", "command", "--force")
    assert load(repository.top / "council.yaml").adapters["my-cli"].use == "command"
    assert "needs endpoint" in refusal(repository, "--adapter", "needy", "--force")
    assert "use one of: alpha-code" in refusal(repository, "--adapter", "alpha-cod", "--force")


def test_editors_get_a_schema(repository: Repository, fakes: FakePrograms) -> None:
    """It is in a file that git ignores, and has the installed adapter types."""
    result = init(repository)
    first = (repository.top / "council.yaml").read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=.council/schema.json"
    assert "alpha-code" in json.dumps(json.loads(Path(result["schema"]).read_text()))
    assert stat.S_IMODE((repository.top / ".council").stat().st_mode) == 0o700


@pytest.mark.extended
def test_foreign_folder_gets_no_schema(repository: Repository, fakes: FakePrograms, tmp_path: Path) -> None:
    """A `.council` that is a link, or came with the repository, is not written to."""
    (tmp_path / "trap").mkdir()
    (repository.top / ".council").symlink_to(tmp_path / "trap")
    result = init(repository)
    assert result["schema"] is None
    assert "$schema" not in (repository.top / "council.yaml").read_text()
    assert list((tmp_path / "trap").iterdir()) == []
    (repository.top / ".council").unlink()
    repository.commit({".council/theirs": "x"})
    assert init(repository, "--force")["schema"] is None
    assert [one.name for one in (repository.top / ".council").iterdir()] == ["theirs"]


def test_file_created_during_replacement_is_kept(tmp_path: Path) -> None:
    """A file that appears during the command is not replaced; no partial file stays."""
    path = tmp_path / "council.yaml"
    path.write_text("theirs\n")
    text = "version: 1\nadapters: {a: {use: command, argv: [x]}}\ntasks: [{id: t, prompt: p}]\n"
    with pytest.raises(RefusedError, match="already exists"):
        write_file(path, text, load_plugins().adapters, force=False)
    with pytest.raises(RefusedError, match="would be invalid there"):
        write_file(path, "version: 2\n", load_plugins().adapters, force=True)
    assert {one.name: one.read_text() for one in tmp_path.iterdir()} == {"council.yaml": "theirs\n"}
    write_file(path, text, load_plugins().adapters, force=True)
    assert {one.name: one.read_text() for one in tmp_path.iterdir()} == {"council.yaml": text}


@needs_sandbox
def test_written_file_runs(repository: Repository, fakes: FakePrograms) -> None:
    """With the program filled in, the first run lands."""
    init(repository)
    fakes.add("my-cli", 'test -f "$1" && echo better > README.md')
    ended = repository.council("run", str(repository.top / "council.yaml"), "--json")
    assert ended.states == {"first": "landed"}, ended.stdout + ended.stderr


def wheel(folder: Path, module: str, code: str) -> None:
    """Write a wheel of one module into a folder."""
    name = f"{module}-1.0"
    files = {
        f"{module}.py": code,
        f"{name}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n",
        f"{name}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    records = "".join(f"{one},,\n" for one in (*files, f"{name}.dist-info/RECORD"))
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as archive:
        for one, text in {**files, f"{name}.dist-info/RECORD": records}.items():
            archive.writestr(one, text)


async def run_with_fake(repository: Repository) -> CommandResult:
    """Commit the generated file, and run its settings with a task for the fake CLI."""
    path = repository.top / "council.yaml"
    config = yaml.safe_load(path.read_text())
    config |= {"target": "main", "adapters": {"fake": repository.fake_adapter()}}
    config["readable"] = [sys.prefix, str(FAKE_CLI.parents[1])]
    config["tasks"] = [{"id": "a", "prompt": "write a.txt a"}]
    path.write_text(json.dumps(config))
    repository.git("add", "--all")
    repository.git("commit", "--quiet", "--message", "council")
    repository.remember()
    found = repository.council("doctor", "--json").result["findings"]
    assert [one for one in found if one["name"] == "programs" and one["level"] != "ok"] == []
    planned = repository.council("run", "--dry-run", "--json")
    assert planned.code == 0, planned
    ended = repository.council("run", "--json", timeout=400)
    await repository.assert_invariants()
    return ended


#: Runs the tests of `unittest` in place of pytest.
RUNNER = "import unittest\nunittest.main(module=None, argv=['pytest', 'discover', '-s', 'tests'])\n"
PASSES = "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        import {module}\n"


@pytest.mark.extended
async def test_written_file_of_a_python_project_runs(repository: Repository) -> None:
    """Setup creates a virtual environment in each worktree, none of which lands; no network is needed for it."""
    (repository.top / "vendor").mkdir()
    wheel(repository.top / "vendor", "pytest", RUNNER)
    wheel(repository.top / "vendor", "dependency", "")
    requirements = "--no-index\n--find-links vendor\npytest\ndependency\n"
    repository.commit({"requirements.txt": requirements, "tests/test_it.py": PASSES.format(module="dependency")})
    result = init(repository)
    assert result["checks"] == [".venv/bin/python -m pytest"]
    [setup] = result["setup"]
    assert setup == "python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt"
    ended = await run_with_fake(repository)
    assert ended.states == {"a": "landed"}, ended
    assert repository.git("ls-files", "--", ".venv") == ""
    assert "base.passed" in [line.get("event") for line in ended.lines]


@pytest.mark.extended
async def test_written_file_of_a_unittest_project_runs(repository: Repository) -> None:
    """Its check discovers the committed tests."""
    repository.commit({"tests/test_it.py": PASSES.format(module="json")})
    result = init(repository)
    assert (result["checks"], result["setup"]) == (["python3 -m unittest discover -s tests"], [])
    ended = await run_with_fake(repository)
    assert ended.states == {"a": "landed"}, ended


@pytest.mark.extended
async def test_written_file_of_a_python_project_without_packages_runs(repository: Repository) -> None:
    """The pytest of the `python3` that sessions see is used, if there is one."""
    repository.commit({"pytest.ini": "[pytest]\n", "tests/test_it.py": "def test_it():\n    import os\n"})
    result = init(repository)
    assert (result["checks"], result["setup"]) == (["python3 -m pytest"], [])
    ended = await run_with_fake(repository)
    assert ended.states == {"a": "landed"}, ended


@pytest.mark.extended
async def test_written_file_of_a_node_project_runs(repository: Repository) -> None:
    """Its packages are installed in each worktree; this one has some in the repository itself."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("Node.js is not installed")
    package = {"name": "x", "version": "1.0.0", "scripts": {"test": "node test.js"}}
    depends = {**package, "dependencies": {"dep": "file:dep"}}
    lock = {
        "name": "x",
        "version": "1.0.0",
        "lockfileVersion": 3,
        "packages": {"": depends, "dep": {"version": "1.0.0"}, "node_modules/dep": {"resolved": "dep", "link": True}},
    }
    files = {
        "package.json": depends,
        "package-lock.json": lock,
        "dep/package.json": {"name": "dep", "version": "1.0.0"},
    }
    texts = {name: json.dumps(value) for name, value in files.items()}
    repository.commit({**texts, "dep/index.js": "", "test.js": "require('dep')\n", ".gitignore": "node_modules/\n"})
    result = init(repository)
    assert (result["checks"], result["setup"]) == (["npm test"], ["npm ci"])
    ended = await run_with_fake(repository)
    assert ended.states == {"a": "landed"}, ended


def test_missing_programs_are_commented_out(repository: Repository, fakes: FakePrograms) -> None:
    """The file names them; it loads without checks, which can be enabled by removing the comment marks."""
    repository.commit({"package.json": json.dumps({"scripts": {"test": "x"}}), "pnpm-lock.yaml": ""})
    result = init(repository)
    assert (result["checks"], result["setup"], result["missing"]) == ([], [], ["pnpm"])
    path = repository.top / "council.yaml"
    assert not load(path).tasks[0].checks
    assert "the sandbox lacks pnpm" in path.read_text()
    path.write_text(path.read_text().replace("# checks:", "checks:").replace("#   - ", "  - "))
    assert load(path).tasks[0].check_commands == ("pnpm test",)


def test_uncommitted_files_are_ignored(repository: Repository, fakes: FakePrograms) -> None:
    (repository.top / "Makefile").write_text("test:\n")
    assert init(repository)["checks"] == []
