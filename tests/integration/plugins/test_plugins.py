"""Third-party plugins: a faulty one is reported and costs only itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from tests.conftest import Repository
from tests.distributions import ADAPTER, REGISTER, REGISTERS, install
from tests.fakes.script import ROOT

_BROKEN = {
    "broken-import": ("import no_such_module_anywhere", "No module named 'no_such_module_anywhere'"),
    "exits": ("import sys; sys.exit('I am off')", "SystemExit: I am off"),
    "wrong-hook": (
        REGISTER + "@hookimpl\ndef council_register_adapters(register, config): ...",
        "PluginValidationError",
    ),
    "unknown-hook": (REGISTER + "@hookimpl\ndef council_register_phases(register): ...", "council_register_phases"),
    "empty": ("x = 1", "it registers nothing"),
    "raises": (REGISTER + "@hookimpl\ndef council_register_adapters(register): 1 / 0", "ZeroDivisionError"),
    "thief": (
        ADAPTER
        + REGISTERS.format(kind="sinks", name="stolen", type="Echo")
        + REGISTERS.format(kind="adapters", name="command", type="Echo"),
        "the name 'command' in adapters is already registered by the plugin 'command' of cli-council",
    ),
    "twice": (ADAPTER + REGISTERS.format(kind="adapters", name="a", type="Echo") + '    register("a", Echo)', "twice"),
    "outdated": (
        ADAPTER + "\ndel Echo.parse\n" + REGISTERS.format(kind="adapters", name="old", type="Echo"),
        "'old' has no parse: it was written for another version of the contract",
    ),
    "optionless": (
        ADAPTER + "\nEcho.Options = dict\n" + REGISTERS.format(kind="adapters", name="loose", type="Echo"),
        "the Options of 'loose' are not a pydantic model",
    ),
    "kindless": (
        REGISTER + REGISTERS.format(kind="handoff_kinds", name="k", type="dict"),
        "expected a name and a pydantic model or a HandoffKind of that name",
    ),
    "plan-thief": (
        REGISTER
        + "from pydantic import BaseModel\n"
        + REGISTERS.format(kind="handoff_kinds", name="plan", type="BaseModel"),
        "the name 'plan' in handoff_kinds is already registered by the plugin 'handoffs' of cli-council",
    ),
    "lax": (
        REGISTER + REGISTERS.format(kind="validators", name="v", type="dict"),
        "expected a name and a HandoffValidator",
    ),
    "typeless": (REGISTER + REGISTERS.format(kind="stores", name="s", type="None"), "expected a name and a type"),
}  # fmt: skip

_ECHO = ADAPTER + REGISTERS.format(kind="adapters", name="echo", type="Echo")


@pytest.fixture
def site(repository: Repository, tmp_path: Path) -> Path:
    """Return a folder on the path of every process that the test starts."""
    folder = tmp_path / "site"
    folder.mkdir()
    repository.environ["PYTHONPATH"] = str(folder)
    return folder


#: The shipped adapters.
OURS = {
    *("acp", "auto-claude", "claude-code", "codex", "command", "gemini", "ollama", "opencode"),
    *(path.stem for path in (ROOT / "adapters/profiles").glob("*.yaml")),
}


def _plugins(repository: Repository, *untrusted: Path, **environ: str) -> dict[str, Any]:
    """Return the plugins that a separate process finds."""
    code = """
import json, sys
from pathlib import Path
from orchestrator.plugins import load_plugins
found = load_plugins(untrusted_paths=[Path(one) for one in sys.argv[1:]])
print(json.dumps({
    "left_out": {one.plugin.name: str(one) for one in found.left_out},
    "loaded": [one.name for one in found.loaded],
    **{kind: sorted(names) for kind, names in found.kinds().items()},
}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, untrusted)],
        env={**repository.environ, **environ},
        cwd=repository.top,
        check=True,
        capture_output=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_handoff_hooks_of_a_plugin_are_used(repository: Repository, site: Path) -> None:
    """A model becomes a kind; a check added to a built-in kind is part of it."""
    code = """
    from orchestrator.domain.workflow.handoff_kinds import HandoffValidator
    from orchestrator.domain.workflow.violations import Violation
    from pydantic import BaseModel

    class Risks(BaseModel):
        risks: list[str]

    @hookimpl
    def council_register_handoff_kinds(register):
        register("risks", Risks)

    @hookimpl
    def council_register_validators(register):
        register("strict", HandoffValidator("scout", lambda data, facts: [Violation("mine", "all", "no", "do")]))

    @hookimpl
    def council_register_transformations(register):
        register("risks_to_plan", lambda data, analysis: data)

    @hookimpl
    def council_register_constraints(register):
        register("never", lambda facts: ())
    """
    install(site, "risks", REGISTER + dedent(code))
    asked = """
import json
from orchestrator.domain.workflow.violations import HandoffContext
from orchestrator.plugins import load_plugins
found = load_plugins()
kinds = found.checked_kinds()
print(json.dumps([
    sorted(kinds), sorted(found.transformations), sorted(found.constraints), kinds["risks"].schema["required"],
    [one.rule for one in kinds["scout"].check({"findings": []}, HandoffContext()).violations],
    [one.rule for one in kinds["risks"].check({}, HandoffContext()).violations],
]))
"""
    done = subprocess.run([sys.executable, "-c", asked], env=repository.environ, check=True, capture_output=True)
    assert json.loads(done.stdout) == [
        ["build", "deploy", "plan", "review", "risks", "scout", "test"],
        ["risks_to_plan", "scout_to_plan"],
        ["never"],
        ["risks"],
        ["mine"],
        ["risks.required"],
    ]


async def test_invalid_plugins_are_reported_and_the_run_continues(repository: Repository, site: Path) -> None:
    """Each kind of broken plugin is named with a reason; the run lands and uses the valid one."""
    for name, (code, _) in _BROKEN.items():
        install(site, name, code)
    install(site, "whole", _ECHO)
    tasks = [
        {"id": "one", "prompt": "write one.txt 1", "adapter": "fake"},
        {"id": "two", "prompt": "Say.", "adapter": "e"},
    ]
    config = repository.configure(tasks)
    value = json.loads(config.read_text())
    value["adapters"]["e"] = {"use": "echo"}
    config.write_text(json.dumps(value))
    ended = repository.council("run", str(config), "--json")
    assert ended.states == {"one": "landed", "two": "landed"}, ended
    reported = {line["plugin"]: line["reason"] for line in ended.lines if line.get("event") == "plugin.skipped"}
    assert reported.keys() == _BROKEN.keys()
    for name, (_, reason) in _BROKEN.items():
        assert reason in reported[name]
        assert f"the plugin {name!r} of {name} 1.0" in reported[name]
    await repository.assert_invariants()


async def test_skipped_plugin_is_named(repository: Repository, site: Path) -> None:
    install(site, "broken", "raise ValueError('first line\\nsecond line')")
    ended = repository.council("run", str(repository.configure([{"id": "one", "prompt": "write one.txt 1"}])))
    assert "skipped the plugin 'broken' of broken 1.0: ValueError: first line second line\n" in ended.stdout
    assert ended.code == 0
    await repository.assert_invariants()


@pytest.mark.extended
def test_invalid_metadata_affects_no_other_plugin(repository: Repository, site: Path) -> None:
    """An entry point that names no module, and a distribution without name or version."""
    install(site, "no-module", "x = 1", module="what is this?")
    install(site, "no-metadata", _ECHO)
    (site / "no_metadata-1.0.dist-info/METADATA").unlink()
    install(site, "whole", _ECHO.replace("'echo'", "'whole'"))
    found = _plugins(repository)
    assert {"command", "echo", "whole"} <= set(found["adapters"])
    assert "AttributeError" in found["left_out"].pop("no-module")
    assert found["left_out"] == {}


@pytest.mark.extended
def test_plugin_with_a_name_of_ours_is_skipped_completely(repository: Repository, site: Path) -> None:
    """The built-in plugin stays, and nothing else that the other registers is used."""
    install(site, "thief", _BROKEN["thief"][0])
    found = _plugins(repository)
    assert set(found["adapters"]) == OURS
    assert "stolen" not in found["sinks"]


@pytest.mark.extended
def test_first_of_two_plugins_with_one_name_is_used(repository: Repository, site: Path) -> None:
    """Whatever the order of installation."""
    install(site, "zebra", _ECHO)
    install(site, "ant", _ECHO)
    found = _plugins(repository)
    assert "ant" in found["loaded"]
    assert "the name 'echo' in adapters is already registered by the plugin 'ant' of ant" in found["left_out"]["zebra"]


@pytest.mark.extended
@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (None, {"first", "second"}),
        ("second", {"second"}),
        pytest.param(" first, second ,", {"first", "second"}, marks=pytest.mark.slow),
        pytest.param("", set(), marks=pytest.mark.slow),
    ],
)
def test_allowlist_selects_plugins_of_others(
    repository: Repository, site: Path, limit: str | None, expected: set[str]
) -> None:
    """Unset it allows all; built-in ones are always allowed, and excluded ones are not even imported."""
    for name in ("first", "second"):
        trace = f"open({str(site / name)!r} + '.imported', 'w').close()\n"
        install(site, name, trace + _ECHO.replace("'echo'", f"'{name}'"))
    found = _plugins(repository, **({} if limit is None else {"COUNCIL_PLUGINS": limit}))
    assert set(found["adapters"]) == OURS | expected
    assert found["left_out"] == {}
    assert {path.stem for path in site.glob("*.imported")} == expected


@pytest.mark.parametrize(
    "where",
    [
        "a shadowing module",
        *(
            pytest.param(one, marks=pytest.mark.slow)
            for one in ("a distribution", "a shadowing package", "a namespace package")
        ),
    ],
)
def test_nothing_in_the_repository_is_imported(repository: Repository, site: Path, where: str) -> None:
    """Agents may write there: it never runs as council, neither as a plugin nor in place of one."""
    trace = site / "trace"
    evil = f"open({str(trace)!r}, 'w').close()\n" + _ECHO
    top = repository.top
    repository.environ["PYTHONPATH"] = os.pathsep.join((str(top), str(site)))
    match where:
        case "a distribution":
            install(top, "evil", evil)
        case "a shadowing module":
            install(site, "evil", _ECHO)
            (top / "evil.py").write_text(evil)
        case "a shadowing package":
            install(site, "evil", _ECHO)
            (top / "evil").mkdir()
            (top / "evil/__init__.py").write_text(evil)
        case _:
            install(site, "evil", _ECHO, module="evil.part", entry="evil")
            (top / "evil").mkdir()
            (top / "evil/part.py").write_text(evil)
    found = _plugins(repository, top)
    assert "it is inside the run's repository" in found["left_out"]["evil"]
    assert not trace.exists()
    ended = repository.council("run", str(repository.configure([{"id": "one", "prompt": "write one.txt 1"}])), "--json")
    assert ended.states == {"one": "landed"}, ended
    assert [line["plugin"] for line in ended.lines if line.get("event") == "plugin.skipped"] == ["evil"]
    assert not trace.exists()


def test_repository_named_by_a_file_is_not_imported(repository: Repository, site: Path, tmp_path: Path) -> None:
    """Wherever the file is, and wherever the command is run."""
    trace = site / "trace"
    install(repository.top, "evil", f"open({str(trace)!r}, 'w').close()\n" + _ECHO)
    repository.environ["PYTHONPATH"] = str(repository.top)
    config = repository.configure([{"id": "one", "prompt": "write one.txt 1"}], repo="project")
    elsewhere = Repository(tmp_path, repository.environ, repository.spawns)
    ended = elsewhere.council("run", str(config), "--json")
    assert ended.states == {"one": "landed"}, ended
    assert [line["plugin"] for line in ended.lines if line.get("event") == "plugin.skipped"] == ["evil"]
    assert not trace.exists()


@pytest.mark.parametrize(
    "where", ["a distribution of our name", pytest.param("a package of our name", marks=pytest.mark.slow)]
)
def test_repository_can_not_impersonate_us(repository: Repository, site: Path, where: str) -> None:
    """A distribution named like ours, and packages named like ours, are not imported either."""
    trace = site / "trace"
    evil = f"open({str(trace)!r}, 'w').close()\n" + _ECHO
    if where == "a distribution of our name":
        install(repository.top, "cli-council", evil, module="evil", entry="command")
    else:
        (repository.top / "adapters").mkdir()
        (repository.top / "adapters/__init__.py").write_text(evil)
    repository.environ["PYTHONPATH"] = str(repository.top)
    found = _plugins(repository, repository.top)
    assert "it is inside the run's repository" in found["left_out"]["command"]
    assert found["adapters"] == []
    assert not trace.exists()


@pytest.mark.extended_variants
@pytest.mark.parametrize(
    ("entry", "code", "limit", "expected"),
    [
        ("echo", "import no_such_module", None, "No module named 'no_such_module'"),
        ("something-else", "import no_such_module", None, "No module named 'no_such_module'"),
        ("something-else", _ECHO.replace("def parse", "def parse_line"), None, "'echo' has no parse"),
        ("echo", _ECHO, "other", "COUNCIL_PLUGINS does not name it"),
    ],
    ids=["its plugin's name", "whatever its plugin would have brought", "its own name", "not among those wanted"],
)
def test_adapter_of_a_skipped_plugin_is_explained_at_its_line(
    repository: Repository, site: Path, entry: str, code: str, limit: str | None, expected: str
) -> None:
    """The mistake in the file says that the plugin was skipped, and why."""
    install(site, "council-echo", code, entry=entry)
    if limit is not None:
        repository.environ["COUNCIL_PLUGINS"] = limit
    config = repository.top.parent / "council.yaml"
    config.write_text(
        f"version: 1\nrepo: {repository.top}\nadapters:\n  e:\n    use: echo\ntasks:\n  - {{id: a, prompt: x}}\n"
    )
    ended = repository.council("run", str(config), "--json")
    assert ended.code == 2
    (problem,) = ended.result["errors"]
    assert (problem["line"], problem["message"]) == (5, "there is no adapter type 'echo'")
    assert f"skipped: the plugin {entry!r} of council-echo 1.0: " in problem["remedy"]
    assert expected in problem["remedy"]


@pytest.mark.extended
async def test_resume_without_a_plugin_is_explained(repository: Repository, site: Path) -> None:
    """An adapter that was available at the start of the run and is skipped now is rejected with the reason."""
    module = install(site, "council-echo", _ECHO)
    config = repository.configure([{"id": "one", "prompt": "x"}], adapters={"e": {"use": "echo"}})
    repository.council("run", str(config), failpoints="run.seeded=kill")
    module.write_text("import no_such_module")
    ended = repository.council("resume", "--json")
    assert ended.code == 2
    assert ended.result["error"].startswith("adapter 'e' uses 'echo', which is not installed: skipped: the plugin")
    module.write_text(_ECHO)
    assert repository.council("resume", "--json").states == {"one": "landed"}
    await repository.assert_invariants()


_STORE = REGISTER + """
import os
from contextlib import asynccontextmanager
from pathlib import Path
from orchestrator.state.stores.memory import MemoryStore


class Loud(MemoryStore):
    def local_paths(self):
        return [Path(os.environ["LOUD_FILE"])] if "LOUD_FILE" in os.environ else []

    async def commit(self, commit):
        print("committed", *[event.type for event in commit.events], flush=True)
        return await super().commit(commit)


@asynccontextmanager
async def open_loud(url, clock):
    print("opened", url, flush=True)
    yield Loud(clock)
    print("closed", flush=True)


@hookimpl
def council_register_stores(register):
    register("loud", open_loud)
"""  # fmt: skip


def test_run_keeps_its_state_in_a_store_of_a_plugin(repository: Repository, site: Path) -> None:
    """`COUNCIL_STATE` selects a third-party store by its scheme, for everything in a run."""
    install(site, "council-loud", _STORE)
    repository.environ["COUNCIL_STATE"] = "loud:somewhere"
    ended = repository.council("run", str(repository.configure([{"id": "one", "prompt": "write one.txt 1"}])))
    assert ended.code == 0, ended
    said = ended.stdout.splitlines()
    assert (said[0], said[-1]) == ("opened loud:somewhere", "closed")
    assert {"committed run.created", "committed task.landed", "committed run.finished"} <= set(said)
    assert (repository.top / "one.txt").exists()
    assert list((repository.top / ".council").glob("state/*")) == []


@pytest.mark.extended
def test_plugin_store_local_paths_are_recorded_with_the_hub(repository: Repository, site: Path, tmp_path: Path) -> None:
    """`council clean` then knows when the store is gone, as for a state folder."""
    install(site, "council-loud", _STORE)
    file = tmp_path / "loud.db"
    file.touch()
    repository.environ.update({"COUNCIL_STATE": "loud:somewhere", "LOUD_FILE": str(file)})
    config = repository.configure([{"id": "one", "prompt": "write one.txt 1"}])
    assert repository.council("run", str(config)).code == 0
    [origin] = Path(repository.environ["COUNCIL_HOME"]).glob("*/origin.json")
    [[_, [path, _]]] = json.loads(origin.read_text())["stores"]
    assert path == str(file.resolve())


@pytest.mark.extended_variants
@pytest.mark.parametrize("url", ["memory:", "file://{}/elsewhere"])
def test_shipped_stores_are_selected_by_url(repository: Repository, tmp_path: Path, url: str) -> None:
    """`memory:` keeps nothing, `file:` keeps it in any folder."""
    repository.environ["COUNCIL_STATE"] = url.format(tmp_path)
    ended = repository.council("run", str(repository.configure([{"id": "one", "prompt": "write one.txt 1"}])), "--json")
    assert ended.states == {"one": "landed"}, ended
    assert (tmp_path / "elsewhere").exists() == url.startswith("file")
    assert list((repository.top / ".council").glob("state/*")) == []


@pytest.mark.extended_variants
@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("etcd://host/1", "there is no store for 'etcd://host/1'"),
        ("postgres://host/1", "there is no store for 'postgres://host/1'"),
        ("file://host/folder", "is not a folder on this machine"),
        ("memory:x", "is not the URL of a store"),
        ("", None),
    ],
)
def test_unknown_store_lists_the_known_ones(repository: Repository, url: str, expected: str | None) -> None:
    """An unknown scheme or an unusable URL is a usage error; an empty variable is ignored."""
    repository.environ["COUNCIL_STATE"] = url
    ended = repository.council("run", str(repository.configure([{"id": "one", "prompt": "write one.txt 1"}])), "--json")
    if expected is None:
        assert ended.code == 0
        return
    assert ended.code == 2
    assert expected in ended.result["error"]
    remedy = ended.result["remedy"]
    assert (remedy == "did you mean 'postgresql'?") == url.startswith("postgres")
    assert url.startswith("postgres") or "file:" in remedy or "memory:" in remedy
