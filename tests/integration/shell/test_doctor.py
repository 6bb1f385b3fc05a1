"""`council doctor` and `council adapters` as typed by a user, on machines of many kinds."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CommandResult, Repository
from tests.fake_programs import FakePrograms, install_fake_programs, install_plugin
from tests.fingerprint import Fingerprint
from tests.sandboxes import default_sandbox, needs_sandbox

TASKS = [{"id": "a", "prompt": "write a.txt a"}]


@pytest.fixture
def fakes(tmp_path: Path, repository: Repository) -> FakePrograms:
    return install_fake_programs(tmp_path, repository)


def findings(ended: CommandResult) -> dict[str, list[tuple[str, str, str | None]]]:
    """Return level, finding and fix by name; the exit code agrees with them."""
    found: dict[str, list[tuple[str, str, str | None]]] = {}
    for one in ended.result["findings"]:
        found.setdefault(one["name"], []).append((one["level"], one["message"], one["remedy"]))
    is_bad = any(level == "problem" for many in found.values() for level, _, _ in many)
    assert ended.code == ended.result["exit"] == int(is_bad), ended.stdout
    return found


def doctor(repository: Repository, *arguments: str) -> dict[str, list[tuple[str, str, str | None]]]:
    return findings(repository.council("doctor", *arguments, "--json"))


def level(found: dict[str, Any], name: str) -> str:
    return str(found[name][0][0])


def test_healthy_machine_has_no_problems(repository: Repository) -> None:
    """Every check runs, and none changes anything."""
    file = repository.configure(TASKS)
    before = Fingerprint.of(repository.top)
    found = doctor(repository, str(file))
    assert {many[0][0] for many in found.values()} <= {"ok", "warning"}
    names = {"system", "git", "repository", "base", "content", "target", ".council", "file", "adapter fake", "sandbox"}
    names |= {"repositories", "state", "temporary", "open files", "memory", "processes", "clock"}
    assert names <= found.keys()
    assert Fingerprint.of(repository.top) == before
    assert not (repository.top / ".council").exists()
    assert not Path(repository.environ["COUNCIL_HOME"]).exists()


@needs_sandbox
def test_report_is_readable_text(repository: Repository, fakes: FakePrograms) -> None:
    """A line for each finding, its fix below, and the count."""
    fakes.add("alpha", "echo alpha 2.1")
    ended = repository.council("doctor")
    assert ended.code == 0
    assert "warning  file" in ended.stdout
    assert "→ create one with `council init`" in ended.stdout
    assert ended.stdout.splitlines()[-1].startswith("no problems, ")


def test_missing_repository_is_reported(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    found = doctor(replace(repository, top=tmp_path / "elsewhere"))
    assert level(found, "repository") == "problem"
    assert "git init" in str(found["repository"][0][2])
    assert "git" in found
    assert "state" not in found
    for arguments in (["status"], ["run"], ["run", "fix the bug"]):
        ended = replace(repository, top=tmp_path / "elsewhere").council(*arguments)
        assert ended.code == 2
        assert f"{tmp_path / 'elsewhere'}" in ended.stderr
        assert "is not in a git repository" in ended.stderr
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.extended
def test_missing_git_is_reported(repository: Repository, fakes: FakePrograms) -> None:
    """Checks that do not need git run all the same."""
    fakes.remove("git")
    found = doctor(repository)
    assert found["git"] == [("problem", "git is not on PATH", "install git 2.38 or newer")]
    assert "repository" not in found
    assert level(found, "temporary") == "ok"
    ended = repository.council("adapters", "--json")
    assert ended.code == 0
    assert ended.result["types"]
    assert repository.council("init").code == 2


def test_old_git_is_reported(repository: Repository, fakes: FakePrograms) -> None:
    """With its version; it is not used."""
    fakes.remove("git")
    fakes.add("git", "echo git version 2.30.2")
    assert doctor(repository)["git"][0][:2] == ("problem", "git 2.30.2 is too old")


def test_file_without_tasks_is_checked_like_a_prompt_run(repository: Repository) -> None:
    """Its adapters are probed; missing tasks are no problem."""
    path = repository.configure(TASKS, defaults={"adapter": "fake"})
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "tasks"}))
    found = doctor(repository, str(path))
    assert (level(found, "file"), "adapter fake" in found) == ("ok", True), found


@pytest.mark.extended
def test_default_file_is_found(repository: Repository) -> None:
    """`council.yaml` here, or at the top of the repository; a named file takes precedence."""
    (repository.top / "council.yaml").write_text("version: 1\n")
    for folder in (repository.top, repository.top / "src"):
        assert "council.yaml:1:1: " in doctor(replace(repository, top=folder))["file"][0][1]
    good = repository.configure(TASKS)
    assert level(doctor(repository, str(good)), "file") == "ok"


@pytest.mark.extended
def test_missing_file_is_reported(repository: Repository) -> None:
    """A problem for a named file, and a hint for the default one."""
    assert level(doctor(repository), "file") == "warning"
    for name in ("nothing.yaml", "no/folder/nothing.yaml"):
        assert level(doctor(repository, name), "file") == "problem"


@pytest.mark.extended
def test_repository_without_a_commit_is_reported(repository: Repository, tmp_path: Path) -> None:
    """Sessions have no base to start from."""
    empty = replace(repository, top=tmp_path / "empty")
    empty.top.mkdir()
    empty.git("init", "--quiet")
    assert "has no commits yet" in doctor(empty)["base"][0][1]


@pytest.mark.extended_variants
@pytest.mark.parametrize("kind", ["sha256", "shallow", "partial", "submodule", "lfs"])
def test_unsupported_repositories_are_reported(kind: str, repository: Repository, tmp_path: Path) -> None:
    """In the words of the error of a run."""
    top = tmp_path / "other"
    if kind == "sha256":
        repository.git("init", "--quiet", "--object-format=sha256", str(top))
    elif kind in {"shallow", "partial"}:
        repository.commit({"b": "b"})
        option = {"shallow": "--depth=1", "partial": "--filter=blob:none"}[kind]
        repository.git("clone", "--quiet", option, repository.top.as_uri(), str(top))
    elif kind == "submodule":
        repository.git("clone", "--quiet", str(repository.top), str(top))
        other = replace(repository, top=top)
        other.git("-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(repository.top), "sub")
        other.git("commit", "--quiet", "--message", "sub")
    else:
        repository.git("clone", "--quiet", str(repository.top), str(top))
        replace(repository, top=top).commit({".gitattributes": "*.bin filter=lfs\n"})
    found = doctor(replace(repository, top=top))
    name = "content" if kind in {"submodule", "lfs"} else "repository"
    (status, words, remedy) = found[name][0]
    assert status == "problem"
    assert {"lfs": "LFS"}.get(kind, kind) in words
    assert remedy


def test_impossible_base_and_target_are_reported(repository: Repository) -> None:
    """A branch that is missing; a target that is checked out with changes of the user's own."""
    assert level(doctor(repository, str(repository.configure(TASKS, base="nope"))), "base") == "problem"
    (repository.top / "README.md").write_text("changed\n")
    assert "README.md" in doctor(repository, str(repository.configure(TASKS)))["target"][0][1]


def test_files_invisible_to_sessions_are_reported(repository: Repository) -> None:
    """Files that adapters and checks name are looked up in the base; committed, elsewhere or nowhere: no problem."""
    (repository.top / "tools").mkdir()
    repository.commit({"kept.sh": "true\n"})
    for name in ("tools/fix.sh", "check me.sh", "test.sh", ":odd"):
        (repository.top / name).write_text("true\n")
    argv = ["sh", "./tools/fix.sh", "kept.sh", "nowhere.sh", ":odd", str(repository.top / "test.sh"), "{prompt}"]
    settings: dict[str, Any] = {"adapters": {"x": {"use": "command", "argv": argv}}}
    tasks = [{"id": "a", "prompt": "word " * 999, "checks": ["! ./test.sh -q"]}]
    [(severity, found, remedy)] = doctor(repository, str(repository.configure(tasks, **settings)))["files"]
    assert (severity, found.partition(": ")[0]) == ("warning", "tools/fix.sh, :odd")
    assert remedy is not None
    repository.git("add", "--all")
    repository.git("commit", "--quiet", "--message", "tools")
    assert "files" not in doctor(repository, str(repository.configure(tasks, **settings)))


@pytest.mark.extended_variants
@pytest.mark.parametrize(
    ("argv", "is_found"),
    [
        (["python3", "tools/fix.py", "{prompt_file}"], True),
        (["./tools/fix.py", "{prompt}"], True),
        (["sh", "-c", "tools/fix.py"], False),
        (["sh", "{prompt_file}"], False),
        (["python3", "tools/kept.py", "not/there.py"], False),
    ],
)
def test_missing_script_of_an_adapter_is_reported(repository: Repository, argv: list[str], is_found: bool) -> None:
    """Neither in the base nor in the checkout; `worktrees.setup` may create it."""
    repository.commit({"tools/kept.py": ""})
    adapters = {"fix": {"use": "command", "argv": argv}}
    found = doctor(repository, str(repository.configure(TASKS, adapters=adapters))).get("files", [])
    finding = ("tools/fix.py: neither in your checkout nor in main, where sessions start", "create and commit")
    assert [(level, words, str(remedy)[:17]) for level, words, remedy in found] == [("warning", *finding)] * is_found
    file = repository.configure(TASKS, adapters=adapters, worktrees={"setup": ["true"]})
    assert "files" not in doctor(repository, str(file))


@pytest.mark.extended
def test_program_of_an_adapter_that_is_not_executable_is_reported(repository: Repository) -> None:
    """An interpreter can run it nevertheless."""
    repository.commit({"tools/fix": "#!/bin/sh\n"})
    direct, by_shell = (
        doctor(repository, str(repository.configure(TASKS, adapters={"fix": {"use": "command", "argv": argv}})))
        for argv in (["./tools/fix"], ["sh", "tools/fix"])
    )
    finding = ("warning", "tools/fix is not executable in main, where sessions start")
    assert direct["files"] == [(*finding, "`chmod +x tools/fix` and commit it")]
    assert "files" not in by_shell


def test_argument_with_a_long_prompt_is_no_file(repository: Repository) -> None:
    """Also if a part of it up to a slash is longer than any file name."""
    tasks = [{"id": "t", "prompt": f"{'fix it ' * 60}in src/a.py"}]
    file = repository.configure(tasks, adapters={"fix": {"use": "command", "argv": ["sh", "-c", "true", "{prompt}"]}})
    assert "files" not in doctor(repository, str(file))


def test_server_is_checked(repository: Repository, tmp_path: Path) -> None:
    """A URL is queried for its branch, and nothing is fetched."""
    url = repository.top.as_uri()
    assert level(doctor(repository, str(repository.configure(TASKS, repo=url))), "repository") == "ok"
    assert level(doctor(repository, str(repository.configure(TASKS, repo=url, base="no"))), "repository") == "problem"
    gone = (tmp_path / "gone").as_uri()
    assert level(doctor(repository, str(repository.configure(TASKS, repo=gone))), "repository") == "problem"


@pytest.mark.extended
def test_own_folder_is_checked(repository: Repository, tmp_path: Path) -> None:
    """A `.council` that git does not ignore, one that is a link, one that came with the repository."""
    folder = repository.top / ".council"
    folder.mkdir()
    assert level(doctor(repository), ".council") == "warning"
    folder.rmdir()
    folder.symlink_to(tmp_path)
    assert level(doctor(repository), ".council") == "problem"
    folder.unlink()
    repository.commit({".council/state/x": "x"})
    assert "git tracks files in .council" in doctor(repository)[".council"][0][1]


@pytest.mark.extended
def test_own_repositories_inside_of_the_users_are_reported(repository: Repository) -> None:
    """COUNCIL_HOME lies elsewhere, and is known."""
    repository.environ["COUNCIL_HOME"] = str(repository.top / "home")
    assert ("problem", "set COUNCIL_HOME to another folder") in [
        (status, remedy) for status, _, remedy in doctor(repository)["repositories"]
    ]
    del repository.environ["COUNCIL_HOME"], repository.environ["HOME"]
    assert "neither COUNCIL_HOME nor HOME" in doctor(repository)["repositories"][0][1]


def test_unwritable_folder_is_reported(repository: Repository) -> None:
    """COUNCIL_STATE selects the folder of the state."""
    repository.environ["COUNCIL_STATE"] = "file:///proc/self/council"
    assert level(doctor(repository), "state") == "problem"


@pytest.mark.extended
def test_low_limit_of_open_files_is_reported(repository: Repository) -> None:
    """With the number of sessions that fit."""

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (56, 56))

    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli.main", "doctor", "--json"],
        cwd=repository.top,
        env=repository.environ,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lower,
    )
    found = findings(CommandResult(done.returncode, done.stdout, done.stderr))
    assert level(found, "open files") == "warning"
    assert found["open files"][0][2] == "raise the limit with `ulimit -n`"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no sandbox")
def test_sandboxes_are_checked(repository: Repository, fakes: FakePrograms) -> None:
    """A broken bubblewrap is reported with its own error and the fix; `off` gets a warning."""
    (fakes.folder / "bwrap").unlink(missing_ok=True)
    fakes.add("bwrap", "echo 'bwrap: setting up uid map: Permission denied' >&2; exit 1")
    status, words, remedy = doctor(repository)["sandbox"][0]
    assert status in {"warning", "problem"}  # Landlock may be available
    assert "uid map: Permission denied" in words
    assert "install bubblewrap" in str(remedy)
    assert "apparmor_restrict_unprivileged_userns" in str(remedy)
    wanted = repository.configure(TASKS, sandbox="bubblewrap")
    assert level(doctor(repository, str(wanted)), "sandbox") == "problem"
    off = repository.configure(TASKS, sandbox="off")
    assert level(doctor(repository, str(off)), "sandbox") == "warning"


@pytest.mark.extended
def test_installed_adapters_are_checked_without_a_file(repository: Repository, fakes: FakePrograms) -> None:
    """All that need no options; if none is installed, one line has the command that shows how to install them."""
    none = doctor(repository)
    assert not [name for name in none if name.startswith("adapter ")]
    [(status, words, remedy)] = none["adapters"]
    assert "council adapters" in str(remedy)
    assert (status, "no supported CLI is on PATH" in words) == ("problem", True)
    assert "use: command" in str(remedy)
    fakes.add("alpha", "echo alpha 3.0")
    found = doctor(repository)
    assert "adapters" not in found
    assert found["adapter alpha-code"][0][0] == "warning"
    assert "alpha 3.0" in found["adapter alpha-code"][0][1]
    assert "adapter beta-code" not in found
    assert "adapter needy" not in found


@pytest.mark.extended
def test_adapters_of_a_file_are_checked(repository: Repository, fakes: FakePrograms) -> None:
    """Adapters of tasks must be installed, of a known version, and logged in."""
    fakes.add("alpha", "echo alpha 2.1")
    fakes.add("beta", 'case "$1" in version) echo 1.0;; *) test "$BETA_LOGIN" = yes;; esac')
    file = repository.top.parent / "own.yaml"
    value = {
        "version": 1,
        "repo": str(repository.top),
        "adapters": {"one": {"use": "alpha-code"}, "two": {"use": "beta-code"}, "unused": {"use": "beta-code"}},
        "tasks": [{"id": "a", "prompt": "p", "adapter": "one"}, {"id": "b", "prompt": "p", "adapter": "two"}],
    }
    file.write_text(json.dumps(value))
    found = doctor(repository, str(file))
    assert level(found, "adapter one") == "ok"
    assert found["adapter two"][0][::2] == ("problem", "run `beta login`")
    assert level(found, "adapter unused") == "warning"
    repository.environ["BETA_LOGIN"] = "yes"
    assert level(doctor(repository, str(file)), "adapter two") == "ok"


@pytest.mark.extended
def test_skipped_plugins_are_reported(repository: Repository, tmp_path: Path) -> None:
    """Both commands name them with the reason."""
    install_plugin(tmp_path, repository, "broken_one", "raise RuntimeError('no such thing')\n")
    (status, words, _) = doctor(repository)["plugin"][0]
    assert status == "warning"
    assert "'broken_one' of broken_one 1.0: RuntimeError: no such thing" in words
    assert "no such thing" in repository.council("adapters", "--json").result["skipped"][0]
    assert "skipped: the plugin 'broken_one'" in repository.council("adapters").stdout


def test_adapters_are_listed(repository: Repository, fakes: FakePrograms) -> None:
    """Types with their programs' status, and the types that need options."""
    path = fakes.add("alpha", "echo alpha 2.1")
    ended = repository.council("adapters", "--json")
    assert ended.code == 0
    types = {one["name"]: one for one in ended.result["types"]}
    assert types.keys() >= {"command", "alpha-code", "beta-code", "needy"}
    assert types["command"]["missing_options"] == "needs argv"
    assert types["needy"]["missing_options"] == "needs endpoint"
    assert types["alpha-code"]["plugin"] == {
        "name": "fake_programs_plugin",
        "distribution": "fake_programs_plugin",
        "version": "1.0",
    }
    (program,) = types["alpha-code"]["programs"]
    assert (program["path"], program["version"], program["is_supported"]) == (str(path), "2.1", True)
    assert types["beta-code"]["programs"][0]["remedy"] == "install beta"
    text = repository.council("adapters").stdout
    assert "alpha-code (fake_programs_plugin 1.0)\n  alpha 2.1, " in text
    assert "needy (fake_programs_plugin 1.0): needs endpoint\n" in text


@pytest.mark.extended
def test_adapters_have_their_state_in_the_newest_run(repository: Repository) -> None:
    """A disabled one has its reason; before any run there is no state."""
    argv = ["sh", "-c", "echo not logged in; exit 1"]
    adapter = {"use": "command", "argv": argv, "failures": {"auth": "not logged in"}}
    value = {"version": 1, "repo": ".", "adapters": {"cli": adapter}, "tasks": [{"id": "a", "prompt": "p"}]}
    value |= default_sandbox()
    file = repository.top / "council.yaml"
    file.write_text(json.dumps(value))
    (before,) = repository.council("adapters", "--json").result["adapters"]
    assert (before["name"], before["use"], before["disabled_reason"]) == ("cli", "command", None)
    assert before["programs"][0]["path"]
    repository.council("run", str(file), "--json")
    (after,) = repository.council("adapters", "--json").result["adapters"]
    assert "not logged in" in after["disabled_reason"]
    assert "  disabled: not logged in" in repository.council("adapters").stdout


@pytest.mark.extended
def test_adapter_in_cooldown_shows_the_end(repository: Repository) -> None:
    """Also while another process runs the run."""
    argv = ["sh", "-c", "echo try again in 3000 s; exit 1"]
    adapter = {"use": "command", "argv": argv, "failures": {"rate_limited": "again in (?P<seconds>[0-9]+)"}}
    value = {"version": 1, "repo": ".", "adapters": {"cli": adapter}, "tasks": [{"id": "a", "prompt": "p"}]}
    value |= default_sandbox()
    file = repository.top / "council.yaml"
    file.write_text(json.dumps(value))
    run = repository.start("run", str(file), "--json")
    try:
        assert run.stdout is not None
        assert any('"adapter.cooling_down"' in line for line in run.stdout)
        assert repository.council("adapters", "--json").result["adapters"][0]["cooldown_until"] > time.time()
        assert "\n  paused until 2" in repository.council("adapters").stdout
    finally:
        run.send_signal(signal.SIGINT)
        run.communicate()


@pytest.mark.extended
def test_invalid_file_does_not_prevent_the_list_of_types(repository: Repository) -> None:
    (repository.top / "council.yaml").write_text("version: 1\n")
    ended = repository.council("adapters", "--json")
    assert (ended.code, ended.result["adapters"]) == (0, [])
    assert ended.result["error_count"] > 0
    assert "has errors" in repository.council("adapters").stdout


@pytest.mark.parametrize("content", ["version: 1\n", None])
def test_unusable_file_is_the_only_problem(repository: Repository, fakes: FakePrograms, content: str | None) -> None:
    """It may define its own adapters: unused types are not rated."""
    file = repository.top / "own.yaml"
    if content is not None:
        file.write_text(content)
    found = doctor(repository, str(file))
    assert found["file"][0][0] == "problem"
    assert [name for name in found if "adapter" in name] == []


@pytest.mark.extended
def test_output_of_programs_is_escaped(repository: Repository, fakes: FakePrograms) -> None:
    """Neither escape sequences nor several lines."""
    fakes.add("alpha", "printf 'one\\n\\033]0;owned\\007two\\033[2J\\n' >&2; exit 1")
    text = repository.council("doctor").stdout + repository.council("adapters").stdout
    assert "\x1b" not in text
    assert "failed with exit code 1: two" in text
    assert os.linesep.join(("two", "")) in text


def programs(repository: Repository, checks: list[str], **settings: Any) -> list[tuple[str, str, str | None]]:
    """Return the findings about programs of checks and setup."""
    file = repository.configure(TASKS, defaults={"checks": checks}, **settings)
    return doctor(repository, str(file))["programs"]


def test_programs_of_checks_are_looked_up_in_the_sandbox(repository: Repository) -> None:
    """A program that is nowhere on PATH is a problem, and so is one in a hidden folder."""
    assert programs(repository, ["true && test -e . | cat", "! grep -q x README.md"])[0][0] == "ok"
    [(status, words, _)] = programs(repository, ["true && no-such-tool --all"])
    assert status == "problem"
    assert "'no-such-tool' not found" in words
    assert repository.environ["PATH"].split(os.pathsep)[0] in words
    [(_, words, _)] = programs(repository, [], worktrees={"setup": ["CI=1 no-such-installer"]})
    assert words.startswith("setup `CI=1 no-such-installer`: program 'no-such-installer' not found")
    hidden = repository.top / "tools"
    hidden.mkdir()
    (hidden / "my-tool").write_text("#!/bin/sh\n")
    (hidden / "my-tool").chmod(0o755)
    repository.environ["PATH"] += f"{os.pathsep}{hidden}"
    [(status, words, remedy)] = programs(repository, ["my-tool"])
    assert (status, f"(hidden from sessions: {hidden})" in words) == ("problem", True)
    assert remedy == f"add {hidden} to `readable`, or install it elsewhere"
    assert programs(repository, ["my-tool"], sandbox="off")[0][0] == "ok"
    environment = hidden / ".venv/bin"
    environment.mkdir(parents=True)
    (hidden / "my-tool").rename(environment / "my-tool")
    (repository.top / ".venv").symlink_to(environment.parent)
    [(status, words, remedy)] = programs(repository, [f"{environment}/my-tool --version"])
    assert (status, "PATH" in words) == ("problem", False)
    assert remedy == f"add {environment} to `readable`, or install it elsewhere"


@pytest.mark.extended
@pytest.mark.parametrize("how", ["file", "option"])
def test_script_that_a_task_may_add_is_accepted(repository: Repository, how: str) -> None:
    """A warning if the check may fail on the base; a problem if it must pass for another task."""
    allowed: dict[str, Any] = {"allow_failing_base": True} if how == "file" else {}
    options = [] if how == "file" else ["--allow-failing-base"]
    file = repository.configure(TASKS, defaults={"checks": ["./out.sh"], **allowed})
    planned = repository.council("run", str(file), "--dry-run", *options, "--json")
    assert planned.code == 0
    [(level, words)] = [
        (one["level"], one["message"]) for one in planned.result["findings"] if one["name"] == "programs"
    ]
    assert (level, "./out.sh is not in main" in words) == ("warning", True)
    if how == "file":
        assert [level for level, _, _ in programs(repository, ["./out.sh"])] == ["problem"]
        strict = {"id": "b", "prompt": "write b.txt b", "allow_failing_base": False}
        file = repository.configure([*TASKS, strict], defaults={"checks": ["./out.sh"], **allowed})
        assert [level for level, _, _ in doctor(repository, str(file))["programs"]] == ["problem"]


def test_programs_of_adapters_are_looked_up_in_the_sandbox(repository: Repository) -> None:
    """A program in a hidden folder on PATH is a problem, unless `readable` names the folder."""
    hidden = repository.top / "tools"
    hidden.mkdir()
    (hidden / "my-cli").write_text("#!/bin/sh\n")
    (hidden / "my-cli").chmod(0o755)
    repository.environ["PATH"] += f"{os.pathsep}{hidden}"
    entry = {"use": "command", "argv": ["my-cli", "{prompt}"]}

    def found(**settings: Any) -> list[tuple[str, str, str | None]]:
        adapters = {"my": {**entry, **settings}}
        file = repository.configure([{"id": "a", "prompt": "x", "adapter": "my"}], adapters=adapters)
        return doctor(repository, str(file))["adapter my"]

    [(level, words, remedy)] = found()
    assert (level, words.endswith(f"(hidden from sessions: {hidden})")) == ("problem", True), words
    assert remedy == f"add {hidden} to `readable` of the adapter 'my', or install it elsewhere"
    assert [level for level, _, _ in found(readable=[str(hidden)])] == ["ok"]


@pytest.mark.extended
def test_ignored_files_are_not_to_be_committed(repository: Repository) -> None:
    """`copy` or `setup` brings them to worktrees, whether a check names them or an adapter."""
    repository.commit({".gitignore": "build/\n"})
    (repository.top / "build").mkdir()
    (repository.top / "build" / "tool").write_text("")
    for allowed in (False, True):
        tasks = [{"id": "a", "prompt": "x", "checks": ["build/tool"], "allow_failing_base": allowed}]
        adapters = {"x": {"use": "command", "argv": ["python3", "build/fix.py", "build/tool"]}}
        found = doctor(repository, str(repository.configure(tasks, adapters=adapters)))
        [(status, _, remedy)] = found["programs"]
        assert (status, str(remedy).partition(":")[0]) == (
            "problem",
            "list it under `worktrees.copy`, or create it in `worktrees.setup`",
        )
        [(_, words, remedy)] = found["files"]
        assert words == "build/fix.py: ignored by git, and not in main, where sessions start"
        assert remedy == "list them under `worktrees.copy`, or create them in `worktrees.setup`"
    given = {"copy": ["build/tool"]}
    assert programs(repository, ["build/tool"], worktrees=given)[0][0] == "ok"


@needs_sandbox
@pytest.mark.parametrize("more", [{}, pytest.param({"stdin": "{prompt}\n"}, marks=pytest.mark.extended)])
def test_run_with_a_hidden_program_is_rejected(repository: Repository, more: dict[str, str]) -> None:
    """No session starts; run, dry run and doctor report the same, and the fix works; also if a bridge starts it."""
    hidden = repository.top / "tools"
    hidden.mkdir()
    (hidden / "my-cli").write_text("#!/bin/sh\necho x >a.txt\n")
    (hidden / "my-cli").chmod(0o755)
    (repository.top / ".git/info/exclude").write_text("tools/\n")
    repository.environ["PATH"] += f"{os.pathsep}{hidden}"
    adapter: dict[str, Any] = {"use": "command", "argv": ["my-cli", "{prompt}"], **more}
    file = repository.configure([{"id": "a", "prompt": "x"}], adapters={"my": adapter})
    ran, planned = (repository.council("run", str(file), *flags, "--json") for flags in ([], ["--dry-run"]))
    assert (ran.code, ran.result["status"], planned.result) == (2, "refused", ran.result)
    [(level, what, remedy)] = doctor(repository, str(file))["adapter my"]
    assert (level, what, remedy) == ("problem", ran.result["error"], ran.result["remedy"])
    assert what == f"program 'my-cli' is installed, but not in the sandbox (hidden from sessions: {hidden})"
    assert f"add {hidden} to `readable` of the adapter 'my', or" in str(remedy)
    file = repository.configure([{"id": "a", "prompt": "x"}], adapters={"my": {**adapter, "readable": [str(hidden)]}})
    assert repository.council("run", str(file), "--json").states == {"a": "landed"}


@pytest.mark.extended
@needs_sandbox
def test_prompt_with_a_hidden_program_runs_after_the_remedy(repository: Repository, fakes: FakePrograms) -> None:
    """Without a file: the error names the command that writes one, and doctor finds the same."""
    hidden = repository.top / "tools"
    hidden.mkdir()
    (hidden / "alpha").write_text("#!/bin/sh\ncase $1 in --version) echo alpha 2.1;; *) echo x >a.txt;; esac\n")
    (hidden / "alpha").chmod(0o755)
    (repository.top / ".git/info/exclude").write_text("tools/\ncouncil.yaml\n")
    repository.environ["PATH"] += f"{os.pathsep}{hidden}"
    ran = repository.council("run", "fix the bug", "--json")
    assert (ran.code, ran.result["status"]) == (2, "refused"), ran
    [(level, what, remedy)] = doctor(repository)["adapter alpha-code"]
    assert (level, what, remedy) == ("warning", ran.result["error"], ran.result["remedy"])
    assert f"create a council.yaml with `council init`, and add {hidden} to `readable` of the adapter" in str(remedy)
    assert repository.council("init").code == 0
    file = repository.top / "council.yaml"
    entry = "use: alpha-code"
    assert file.read_text().count(entry) == 1, file.read_text()
    file.write_text(file.read_text().replace(entry, f"use: alpha-code\n    readable: [{hidden}]"))
    ended = repository.council("run", "fix the bug", "--json")
    assert ended.states == {"task-1": "landed"}, ended


@pytest.mark.extended
def test_virtual_environment_in_the_checkout_is_reported(repository: Repository) -> None:
    """Setup creates one in each worktree; no message suggests a commit of it."""
    repository.commit({".gitignore": ".venv/\nvenv/\n", "tools/check": "#!/bin/sh\n"})
    for name in (".venv/bin/python", ".venv/bin/my-tests", ".venv/pyvenv.cfg", "local.sh"):
        path = repository.top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    file = repository.configure(TASKS, defaults={"checks": [".venv/bin/python -m pytest", "sh .venv/bin/my-tests"]})
    found = doctor(repository, str(file))
    [(status, words, remedy)] = found["programs"]
    assert status == "problem"
    assert ".venv/bin/python is not in main" in words
    assert "worktrees.setup" in str(remedy)
    assert "files" not in found
    assert remedy == "create it in `worktrees.setup`: worktrees contain only committed files"
    setup = {"setup": ["python3 -m venv .venv"]}
    assert programs(repository, [".venv/bin/python -m pytest"], worktrees=setup)[0][0] == "ok"
    [(_, words, remedy)] = programs(repository, ["my-tests -q"])
    assert ".venv/bin/my-tests" in str(remedy)
    [(_, words, remedy)] = programs(repository, ["./local.sh"])
    assert remedy == "commit it"
    checks = {"checks": [".venv/bin/python -m pytest"], "allow_failing_base": True}
    assert doctor(repository, str(repository.configure(TASKS, defaults=checks)))["programs"] == found["programs"]
    [(_, words, remedy)] = programs(repository, ["tools/check"])
    assert "not executable" in words
    assert remedy == "`chmod +x tools/check` and commit it"
