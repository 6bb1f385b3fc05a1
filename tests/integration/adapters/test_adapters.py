"""Whole runs with each adapter: its changes land, and its reported failures select the reaction."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest

from orchestrator.api.council import Council
from orchestrator.testing.clock import ManualClock
from tests.conftest import CommandResult, Repository
from tests.fakes.ollama_server import Server, run_server
from tests.fakes.script import ROOT, install
from tests.integration.runs.test_scheduler import until_event
from tests.sandboxes import SANDBOX_PARAMS

ADAPTERS = ("claude-code", "aider", "acp", "ollama")
#: One adapter of a program and one of a bridge each; the contract tests cover output parsing.
QUICK = tuple(pytest.param(use, marks=() if use in {"claude-code", "ollama"} else pytest.mark.slow) for use in ADAPTERS)


@dataclass(frozen=True)
class Bench:
    """A repository, fake CLIs on its PATH, and a model server."""

    repository: Repository
    bin: Path
    server: Server

    def adapter(self, use: str, **more: Any) -> dict[str, Any]:
        """Return the entry of an adapter."""
        own: Mapping[str, dict[str, Any]] = {
            "acp": {"argv": ["acp-agent"]},
            "ollama": {"model": "stub", "host": self.server.url},
        }
        return {"use": use, **own.get(use, {}), **more}

    def run(
        self, use: str, *prompts: str, sandbox: str = "off", options: dict[str, Any] | None = None, **more: Any
    ) -> CommandResult:
        """Run tasks t0, t1, … with one adapter; `more` are keys of each task."""
        tasks = [{"id": f"t{number}", "prompt": text, "attempts": 1, **more} for number, text in enumerate(prompts)]
        config = self.repository.configure(
            tasks,
            adapters={"it": self.adapter(use, capacity=1, **(options or {}))},
            sandbox=sandbox,
            readable=[str(self.bin), sys.prefix, str(ROOT / "tests")],
        )
        return self.repository.council("run", str(config), "--json")

    def output(self, ended: CommandResult) -> str:
        """Return the output of the first task's program."""
        logs = self.repository.top / ".council" / "logs" / ended.result["run"]
        return "".join(path.read_text() for path in sorted(logs.glob("t0.1.std*")))


@pytest.fixture
def bench(repository: Repository, tmp_path: Path) -> Iterator[Bench]:
    """Fake CLIs on PATH, a model server on loopback."""
    folder = tmp_path / "bin"
    for name, module in (("claude", "claude"), ("aider", "aider"), ("acp-agent", "acp_agent")):
        install(folder, name, f"tests.fakes.{module}")
    repository.environ["PATH"] = f"{folder}{os.pathsep}{repository.environ['PATH']}"
    with run_server() as server:
        yield Bench(repository, folder, server)


def write(use: str, path: str, text: str) -> str:
    """Return a prompt that makes an adapter's program write one line to a file."""
    return f"```file {path}\n{text}\n```\n" if use == "ollama" else f"write {path} {text}\n"


@pytest.mark.extended_variants
@pytest.mark.parametrize("sandbox", SANDBOX_PARAMS)
@pytest.mark.parametrize("use", ADAPTERS)
async def test_work_of_a_program_lands(bench: Bench, use: str, sandbox: str) -> None:
    """The program's own files do not land."""
    ended = bench.run(use, write(use, "src/new.py", "print(1)"), sandbox=sandbox)
    assert ended.states == {"t0": "landed"}, bench.output(ended) if ended.stdout else ended
    assert (bench.repository.top / "src/new.py").read_text() == "print(1)\n"
    assert bench.repository.git("ls-files").split() == ["README.md", "src/app.py", "src/new.py"]
    await bench.repository.assert_invariants()


async def test_files_in_the_repository_are_work_whatever_their_name(bench: Bench) -> None:
    """Only new files count as the program's own."""
    bench.repository.commit({".aider.conf.yml": "auto-lint: true\n"}, "a configuration of aider's")
    ended = bench.run("aider", "write .aider.conf.yml auto-lint: false\nwrite .aider.new x")
    assert ended.states == {"t0": "landed"}, ended
    assert bench.repository.git("show", "--name-only", "--format=", "HEAD^2").split() == [".aider.conf.yml"]


FAIL_AUTH = {"claude-code": "fail auth", "aider": "fail auth", "acp": "fail auth", "ollama": "fail 401"}
REMEDIES = {"claude-code": "claude auth login", "aider": "API_KEY", "acp": "agent login", "ollama": "OLLAMA_API_KEY"}


@pytest.mark.extended_variants
@pytest.mark.parametrize("use", QUICK)
async def test_failed_login_disables_the_adapter(bench: Bench, use: str) -> None:
    """No further session starts, no attempt is counted, and the reason says how to log in."""
    ended = bench.run(use, FAIL_AUTH[use], write(use, "b.txt", "b"))
    assert ended.states == {"t0": "blocked", "t1": "blocked"}, ended
    assert REMEDIES[use] in ended.result["tasks"][0]["reason"]
    assert [task["attempts"] for task in ended.result["tasks"]] == [0, 0]
    assert ended.result["adapters"][0]["name"] == "it"


@pytest.mark.extended
async def test_usage_limit_starts_a_cooldown_until_the_reset_time(bench: Bench) -> None:
    """The end is the time that the program reported; the attempt does not count."""
    began = time.time()
    ended = bench.run("claude-code", "attempt 1 fail limit 2\nwrite a.txt a")
    assert ended.states == {"t0": "landed"}, ended
    until = next(line["until"] for line in ended.lines if line.get("event") == "adapter.cooling_down")
    assert began < until < began + 60
    assert ended.result["tasks"][0]["attempts"] == 1


@pytest.mark.slow
async def test_usage_limit_without_an_end_starts_a_cooldown(bench: Bench) -> None:
    """Aider and ACP agents report no end: they get a cooldown all the same, on a clock that the test drives."""
    prompt = "attempt 1 fail limit\nwrite {}.txt x"
    tasks = [{"id": use, "prompt": prompt.format(use), "adapter": use, "attempts": 1} for use in ("aider", "acp")]
    path = bench.repository.configure(
        tasks, adapters={use: bench.adapter(use) for use in ("aider", "acp")}, sandbox="off", readable=[]
    )
    clock = ManualClock()
    async with Council.open(path, clock=clock, environ=bench.repository.environ) as council:
        run = await council.runs.create()
        async with anyio.create_task_group() as group:
            group.start_soon(council.runs.resume, run)
            await until_event(council, "adapter.cooling_down", 2)
            await anyio.wait_all_tasks_blocked()
            parked = (await council.runs.status(run)).adapters
            clock.advance(max(one.cooldown_until or 0.0 for one in parked) - clock.now())
        report = await council.runs.status(run)
    assert [(task.status, task.attempts) for task in report.tasks] == [("landed", 1), ("landed", 1)]


#: A step for which the program is denied a tool, and how that is reported.
DENIED = {
    "claude-code": ("deny make test", "1 tool denied: Bash(make test): set `permission_mode: bypassPermissions`"),
    "acp": ("edit ../up.txt x", "1 tool denied: "),
}


@pytest.mark.extended_variants
@pytest.mark.parametrize("use", DENIED)
async def test_denied_tool_is_reported_by_each_command(bench: Bench, use: str) -> None:
    """A session that was denied everything has this as its reason; one that worked all the same shows it too."""
    step, reported = DENIED[use]
    ended = bench.run(use, f"{step}\nsay x", f"{step}\nwrite a.txt x")
    assert ended.states == {"t0": "no_change", "t1": "landed"}, ended
    events = {line["task"]: line for line in ended.lines if line.get("event") == "task.tools_denied"}
    assert {task: (one["count"], len(one["tools"])) for task, one in events.items()} == {"t0": (1, 1), "t1": (1, 1)}
    assert reported in ended.result["tasks"][0]["reason"]
    status, *stories = (
        " ".join(bench.repository.council(*words).stdout.split())
        for words in (("status",), ("show", "t0"), ("show", "t1"))
    )
    assert status.count(reported) == 2, status
    assert all(reported in story for story in stories), stories


@pytest.mark.extended_variants
@pytest.mark.parametrize("use", ["claude-code", "aider"])
async def test_half_work_of_a_failed_program_does_not_land(bench: Bench, use: str) -> None:
    """Files were changed before the error; aider even exits with 0."""
    ended = bench.run(use, f"{write(use, 'a.txt', 'half')}fail auth")
    assert ended.states == {"t0": "blocked"}, ended
    assert not (bench.repository.top / "a.txt").exists()


async def test_half_work_of_an_interrupted_program_does_not_land(bench: Bench) -> None:
    """The program exits with 0 as on an interrupt, but reported no result."""
    ended = bench.run("claude-code", "write a.txt half\nfail silently")
    assert (ended.states, ended.result["tasks"][0]["failure"]) == ({"t0": "failed"}, "crashed"), ended
    assert not (bench.repository.top / "a.txt").exists()


async def test_temporary_error_is_not_a_failure(bench: Bench) -> None:
    """Aider retries and succeeds: the error that it printed in between does not count."""
    ended = bench.run("aider", "stumble\nwrite a.txt a")
    assert ended.states == {"t0": "landed"}, ended


ENDS = {
    "claude-code": [
        ("fail overloaded", "overloaded", "529"),
        ("fail turns", "limit", "--max-turns"),
        ("fail drop", "crashed", "exit code 1"),
        ("fail plain", "invalid", "root"),
    ],
    "aider": [("fail context", "limit", "token limit")],
    "acp": [
        ("fail die", "crashed", "exit code 7"),
        ("fail refuse", "refused", "refused to continue"),
        ("stop ../up.txt", "refused", "outside of the worktree"),
        ('fail 400 {"error":{"message":"It is wrong."}}', "invalid", "reports: It is wrong."),
        ("fail 500 exception TypeError: fetch failed sending request", "transient", "fetch failed"),
        ("fail 500 An internal error has occurred.", "overloaded", "internal error"),
        ("fail -32603 Internal error: API Error: 400 It is wrong.", "invalid", "400"),
        ("fail 400 The input token count (9) exceeds the maximum", "limit", "exceeds"),
    ],
    "ollama": [
        ("fail 503", "overloaded", "503"),
        ("fail 500", "overloaded", "500"),
        ("fail 400", "invalid", "400"),
        ("fail drop", "transient", "interrupted its response"),
        ("fail error", "transient", "while running the model"),
        ("fail length", "limit", "raise `context`"),
        ("word " * 12_000, "limit", "raise `context`"),
        ("```file a.txt\nhalf", "crashed", "not closed"),
        ("```diff\n--- a/src/app.py\n+++ b/src/app.py\n@@ -1 +1 @@\n-nope\n+x\n```", "crashed", "not apply"),
    ],
}


@pytest.mark.extended_variants
@pytest.mark.parametrize("use", QUICK)
async def test_failure_has_its_class(bench: Bench, use: str) -> None:
    """Output and exit code of the program decide the class and the reason."""
    ended = bench.run(use, *(prompt for prompt, _, _ in ENDS[use]))
    for task, (prompt, failure, expected) in zip(ended.result["tasks"], ENDS[use], strict=True):
        assert (task["status"], task["failure"]) == ("failed", failure), (prompt, task)
        assert expected in task["reason"], prompt
    if use == "acp":
        assert "last words" in bench.output(ended), "the standard error of an agent is missing in the log"


@pytest.mark.extended
@pytest.mark.parametrize("sandbox", SANDBOX_PARAMS)
async def test_output_after_a_stop_is_parsed(bench: Bench, sandbox: str) -> None:
    """Claude Code reports its usage only when it is interrupted."""
    ended = bench.run("claude-code", "hang", sandbox=sandbox, timeout="4s")
    (task,) = ended.result["tasks"]
    assert (task["status"], task["failure"]) == ("failed", "timeout"), ended
    assert (task["input_tokens"], task["output_tokens"], task["cost"]) == (3210, 42, 0.0125)


@pytest.mark.extended
async def test_usage_is_recorded(bench: Bench) -> None:
    """All four formats of tokens and cost are parsed; the adapters run concurrently in one run."""
    expected = {
        "claude-code": (3210, 42, 0.0125),
        "aider": (4200, 1100, 0.01),
        "acp": (40, 20, 0.5),
        "ollama": (26, 259, None),
    }
    tasks = [{"id": use, "prompt": write(use, f"{use}.txt", "x"), "adapter": use} for use in ADAPTERS]
    config = bench.repository.configure(
        tasks, adapters={use: bench.adapter(use) for use in ADAPTERS}, sandbox="off", readable=[]
    )
    ended = bench.repository.council("run", str(config), "--json")
    assert set(ended.states.values()) == {"landed"}, ended
    for task in ended.result["tasks"]:
        found = tuple(task[key] for key in ("input_tokens", "output_tokens", "cost"))
        assert found == expected[task["id"]], task
    used = bench.repository.council("usage", "--json").result
    assert {name: (one["input_tokens"], one["output_tokens"], one["cost"]) for name, one in used["tasks"].items()} == (
        expected
    )
    assert (used["total"]["sessions"], used["total"]["priced"], used["total"]["input_tokens"]) == (4, 3, 7476)
    shown = bench.repository.council("usage").stdout.splitlines()
    assert shown[0].split() == ["sessions", "time", "tokens", "in", "tokens", "out", "cost"]
    assert shown[-1].endswith("$0.5225 (3 of 4 sessions, estimated)")
    assert [line.split()[:3] for line in shown if line.startswith("task ollama")] == [["task", "ollama", "1"]]


@pytest.mark.extended
async def test_acp_agent_reads_and_writes_in_the_worktree_only(bench: Bench, tmp_path: Path) -> None:
    """A path outside is rejected with an error, a path inside is served."""
    (tmp_path / "secret").write_text("canary")
    prompt = f"read src/app.py\nread {tmp_path}/secret\nwrite {tmp_path}/out.txt x\nwrite .git y\nwrite in.txt z"
    ended = bench.run("acp", prompt)
    assert ended.states == {"t0": "landed"}, ended
    assert not (tmp_path / "out.txt").exists()
    output = bench.output(ended)
    assert "def main():" in output
    assert "canary" not in output
    assert output.count('"type": "denied"') == 3
    assert bench.repository.git("show", "--name-only", "--format=", "HEAD^2").split() == ["in.txt"]


async def test_acp_agent_gets_permission_in_the_worktree(bench: Bench, tmp_path: Path) -> None:
    """Permission is granted once, never always; a path outside is rejected."""
    target = tmp_path / "outside.txt"
    ended = bench.run("acp", f"edit in.txt x\nedit {target} x\nedit ../up.txt x\nwork")
    assert ended.states == {"t0": "landed"}, ended
    chosen = re.findall(r'"message", "text": "chosen: (\w+)"', bench.output(ended))
    assert chosen == ["once", "no", "no", "once"]
    assert not target.exists()


@pytest.mark.slow
async def test_acp_agent_model_can_be_chosen(bench: Bench) -> None:
    """An unknown model is rejected with the available ones."""
    ended = bench.run("acp", "say with MODEL\nwrite a.txt x", options={"model": "large"})
    assert ended.states == {"t0": "landed"}, ended
    assert "with large" in bench.output(ended)
    task = bench.run("acp", "write a.txt x", options={"model": "huge"}).result["tasks"][0]
    assert (task["failure"], "small, large" in task["reason"]) == ("invalid", True), task


@pytest.mark.extended
async def test_acp_agent_tokens_beyond_the_protocol_are_recorded(bench: Bench) -> None:
    """Gemini CLI reports its tokens this way."""
    (task,) = bench.run("acp", "write a.txt x", options={"env": {"ACP_BESIDE": "1"}}).result["tasks"]
    assert (task["input_tokens"], task["output_tokens"]) == (40, 20)


@pytest.mark.parametrize(
    ("env", "failure"),
    [({"ACP_LOGGED_OUT": "1"}, None), ({"ACP_VERSION": "7"}, "invalid")],
)
@pytest.mark.slow
async def test_acp_agent_that_fails_to_start_reports_the_reason(
    bench: Bench, env: dict[str, str], failure: str | None
) -> None:
    """A missing login, or another protocol version."""
    task = bench.run("acp", "write a.txt x", options={"env": env}).result["tasks"][0]
    assert (task["status"], task["failure"]) == (("failed", failure) if failure else ("blocked", "auth")), task
    assert ("agent login" in task["reason"]) == (failure is None)


@pytest.mark.extended
@pytest.mark.parametrize(
    ("env", "resumed"),
    [
        pytest.param({"ACP_LOADS": "1"}, [False, True], marks=pytest.mark.slow),
        ({"ACP_MODES": "one"}, [False, True, False]),
    ],
)
async def test_acp_agent_repairs_its_work_in_the_same_conversation(
    bench: Bench, env: dict[str, str], resumed: list[bool]
) -> None:
    """An agent that fails to load the conversation loses that attempt and gets the full prompt in the next."""
    config = bench.repository.configure(
        [{"id": "t0", "prompt": "attempt 1 write a.txt wrong\nattempt 3 write a.txt right", "attempts": 3}],
        adapters={"it": bench.adapter("acp", home="own", resumes=True, env=env)},
        readable=[str(bench.bin), sys.prefix, str(ROOT / "tests")],
        defaults={
            # The fake agent executes the check's output as steps.
            "allow_failing_base": True,
            "checks": ["grep -q right a.txt || { echo 'write a.txt right' ; echo 'say MENDED'; exit 1; }"],
            "backoff": {"initial": "10ms", "max": "10ms", "jitter": False},
        },
    )
    ended = bench.repository.council("run", str(config), "--json")
    assert ended.states == {"t0": "landed"}, ended
    shown = bench.repository.council("state", "history", f"task/{ended.result['run']}/t0", "--json")
    attempts = shown.result["versions"][0]["new"]["attempts"]
    assert [one["resumed"] for one in attempts] == resumed
    assert [one["outcome"] for one in attempts] == [
        "checks_failed",
        *(["transient"] if len(resumed) == 3 else []),
        "built",
    ]
    await bench.repository.assert_invariants()


@pytest.mark.extended
async def test_acp_agent_gets_servers_with_their_variables(bench: Bench) -> None:
    """The stored file has only the names of the variables."""
    bench.repository.environ["MY_SETTING"] = "what it is"
    config = bench.repository.configure(
        [{"id": "t0", "prompt": "servers\nwrite a.txt x"}],
        adapters={"it": bench.adapter("acp")},
        sandbox="off",
        mcp_servers={"files": {"command": ["mcp-files", "."], "env": ["MY_SETTING"]}},
    )
    ended = bench.repository.council("run", str(config), "--json")
    assert ended.states == {"t0": "landed"}, ended
    assert '{\\"name\\":\\"MY_SETTING\\",\\"value\\":\\"what it is\\"}' in bench.output(ended)


HOSTILE = {
    "absolute": "```file /tmp/council-hostile.txt\nx\n```",
    "above": "```file ../../hostile.txt\nx\n```",
    "inside-out": "```file src/../../hostile.txt\nx\n```",
    "git": "```file .git/hooks/pre-commit\nx\n```",
    "git-case": "```file sub/.GIT/config\nx\n```",
    "gitfile": "```file .git\ngitdir: /tmp\n```",
    "link": "```file link/hostile.txt\nx\n```",
    "diff-above": "```diff\n--- /dev/null\n+++ b/../../hostile.txt\n@@ -0,0 +1 @@\n+x\n```",
    "diff-absolute": "```diff\n--- /dev/null\n+++ /tmp/council-hostile.txt\n@@ -0,0 +1 @@\n+x\n```",
    "diff-link": "```diff\n--- /dev/null\n+++ b/link/hostile.txt\n@@ -0,0 +1 @@\n+x\n```",
    "diff-symlink": "```diff\ndiff --git a/l b/l\nnew file mode 120000\n--- /dev/null\n+++ b/l\n@@ -0,0 +1 @@\n"
    "+/tmp\n\\ No newline at end of file\n```",
    "diff-rename": "```diff\ndiff --git a/README.md b/../../hostile.txt\nsimilarity index 100%\nrename from README.md\n"
    "rename to ../../hostile.txt\n```",
}


@pytest.mark.extended
async def test_ollama_response_can_not_leave_the_worktree(bench: Bench, tmp_path: Path) -> None:
    """The whole answer is rejected, including its valid part; the task's reason says so."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (bench.repository.top / "link").symlink_to(outside)
    bench.repository.commit({}, "a symlink")
    ended = bench.run("ollama", *(f"```file good.txt\nx\n```\n{answer}" for answer in HOSTILE.values()))
    for name, task in zip(HOSTILE, ended.result["tasks"], strict=True):
        assert (task["status"], task["failure"], task["branch"]) == ("failed", "refused", None), (name, task)
        assert "nothing of the response was applied" in task["reason"]
    assert list(outside.iterdir()) == []
    assert list(tmp_path.rglob("hostile*")) == []
    assert not Path("/tmp/council-hostile.txt").exists()


async def test_ollama_model_gets_the_files_of_the_prompt(bench: Bench) -> None:
    """All names up to the limit, and contents of text files up to the limit, named files first."""
    bench.repository.commit(
        {
            **{f"many/{number}.txt": f"filler {number} " * 50 for number in range(200)},
            "deep/down/wanted.py": "WANTED\n",
            "fence.md": "````\n```python\n```\n````\n",
        }
    )
    (bench.repository.top / "image.png").write_bytes(b"\x89PNG\0\0")
    bench.repository.commit({}, "binary")
    ended = bench.run("ollama", "Change wanted.py and fence.md.", options={"context": 4096})
    assert ended.states == {"t0": "no_change"}, ended
    asked = bench.server.asked[0]
    shown = asked["messages"][1]["content"]
    assert asked["options"] == {"num_ctx": 4096}
    assert "WANTED" in shown
    assert "`````file fence.md\n````\n" in shown
    assert "PNG" not in shown
    assert len(shown) < 4096 * 3 // 2 + 200


@pytest.mark.extended
async def test_ollama_missing_model_has_a_remedy(bench: Bench) -> None:
    """The reason names `ollama pull`."""
    task = bench.run("ollama", "x", options={"model": "none:7b"}).result["tasks"][0]
    assert (task["failure"], "ollama pull none:7b" in task["reason"]) == ("invalid", True), task


@pytest.mark.slow
async def test_ollama_missing_server_disables_the_adapter(bench: Bench) -> None:
    """After a few seconds of retries: a person has to start the server, and no attempt is counted."""
    ended = bench.run("ollama", "x", options={"host": "http://127.0.0.1:9"})
    task = ended.result["tasks"][0]
    assert (task["status"], task["attempts"]) == ("blocked", 0), ended
    assert "ollama serve" in task["reason"]


@pytest.mark.extended
async def test_ollama_diffs_and_files_are_applied_together(bench: Bench) -> None:
    """A diff with wrong counts, a deletion and a new file in one answer."""
    diff = "--- a/src/app.py\n+++ b/src/app.py\n@@ -1,9 +1,7 @@\n def main():\n-    return 0\n+    return 1\n"
    gone = "--- a/README.md\n+++ /dev/null\n@@ -1 +0,0 @@\n-# Project\n"
    ended = bench.run("ollama", f"Sure!\n```diff\n{diff}```\n```diff\n{gone}```\n````file n.md\n```x\n```\n````\nDone.")
    assert ended.states == {"t0": "landed"}, ended
    assert (bench.repository.top / "src/app.py").read_text() == "def main():\n    return 1\n"
    assert (bench.repository.top / "n.md").read_text() == "```x\n```\n"
    assert not (bench.repository.top / "README.md").exists()


@pytest.mark.extended
def test_program_that_git_does_not_make_executable_names_the_fix(repository: Repository) -> None:
    """In the user's checkout it is executable, so it is not hidden from sessions."""
    repository.commit({"tools/cli": "#!/bin/sh\nexit 0\n"}, "a program")
    repository.git("config", "core.fileMode", "false")
    (repository.top / "tools/cli").chmod(0o755)
    adapters = {"own": {"use": "command", "argv": ["tools/cli"]}}
    config = repository.configure([{"id": "one", "prompt": "x", "attempts": 1}], adapters=adapters)
    ended = repository.council("run", str(config), "--json", "--allow-deferred")
    reasons = " ".join(str(line.get("reason")) for line in ended.lines)
    assert "Permission denied: `chmod +x tools/cli` and commit it" in reasons, ended
    assert "hidden" not in reasons
