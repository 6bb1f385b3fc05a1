"""`council mcp --steer` as an agent outside of sessions sees it: a real client, process and run."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from orchestrator.api.council import Council
from orchestrator.cli.render.events import event_text
from orchestrator.protocols import Event
from tests.conftest import Repository
from tests.integration.workflows.test_approvals import ASKS, STEPS
from tests.sandboxes import WORKING_SANDBOXES
from tests.waiting import wait_for

if TYPE_CHECKING:
    from mcp import ClientSession

ROOT = Path(__file__).parents[3]
#: A name that could be mistaken for an event, with a control character.
CLIENT = "editor' approved\x1b[2J"


@asynccontextmanager
async def steering(repository: Repository, pid_file: Path | None = None) -> AsyncIterator[ClientSession]:
    """Connect to a server in the repository; its process writes its id to a file."""
    from mcp import ClientSession, StdioServerParameters, stdio_client  # noqa: PLC0415  the import takes a second
    from mcp_types import Implementation  # noqa: PLC0415

    noted = "" if pid_file is None else f"echo $$ > {pid_file}; "
    started = StdioServerParameters(
        command="/bin/sh",
        args=["-c", f'{noted}exec "$0" -P -m orchestrator mcp --steer', sys.executable],
        cwd=repository.top,
        env=repository.environ,
    )
    info = Implementation(name=CLIENT, version="1.2")
    async with stdio_client(started) as streams, ClientSession(*streams, client_info=info) as session:
        await session.initialize()
        yield session


async def call(session: ClientSession, tool: str, **arguments: Any) -> dict[str, Any]:
    """Return the result of a tool."""
    answer = await session.call_tool(tool, arguments)
    assert not answer.is_error, answer
    result = answer.structured_content
    assert isinstance(result, dict)
    return result


async def refusal(session: ClientSession, tool: str, **arguments: Any) -> str:
    """Return the error of a tool."""
    answer = await session.call_tool(tool, arguments)
    assert answer.is_error, answer
    (content,) = answer.content
    assert content.type == "text"
    return content.text


async def watch(session: ClientSession, started: dict[str, Any], until: str) -> list[str]:
    """Follow a run until a field of the result of `watch` is true, or with `ended` to its end; return the events."""
    cursor, texts = started["cursor"], []
    with anyio.fail_after(60):
        while True:
            seen = await call(session, "watch", run=started["run"], cursor=cursor, wait=5)
            texts += [one["text"] for one in seen["events"]]
            assert cursor <= seen["cursor"]
            cursor = seen["cursor"]
            if not seen["is_live"] if until == "ended" else seen[until]:
                return texts


async def read(session: ClientSession, uri: str) -> str:
    """Return the text of a resource."""
    (content,) = (await session.read_resource(uri)).contents
    assert hasattr(content, "text")
    return str(content.text)


async def recorded(repository: Repository) -> list[Event]:
    """Return the recorded calls, in order."""
    async with Council.open(repository.top, environ=repository.environ) as council:
        commits = [one async for one in council.history.commits(until=await council.history.position())]
    return [event for one in commits for event in one.events if event.type == "steering.called"]


@pytest.mark.extended
async def test_agent_plans_starts_approves_and_merges(repository: Repository) -> None:
    """And every call is recorded with the name that the client gave itself, quoted."""
    task = {"id": "t", "prompt": "\n".join(STEPS), "workflow": "asks"}
    file = repository.configure([task], workflows=ASKS, target=None)
    file.write_text(json.dumps({key: one for key, one in json.loads(file.read_text()).items() if one is not None}))
    async with steering(repository) as session:
        plan = await call(session, "plan", file=str(file))
        assert [[one["id"] for one in wave["tasks"]] for wave in plan["waves"]] == [["t"]]
        started = await call(session, "start", file=str(file))
        texts = await watch(session, started, "awaiting_approval")
        assert any("`council approve t " in one for one in texts), texts  # in the commit that sets the status
        shown = await call(session, "show", run=started["run"], task="t")
        assert shown["status"] == "awaiting_approval"
        assert (await call(session, "approve", tasks=["t"], note="good"))["run"] == started["run"]
        texts = await watch(session, started, "ended")
        assert any("landed" in one for one in texts), texts
        assert repository.council("status", "--json").states == {"t": "landed"}

        run = started["run"]
        assert json.loads(await read(session, f"council://runs/{run}"))["status"] == "landed"
        assert json.loads(await read(session, "council://runs"))["runs"][0]["run"] == run
        assert "session 2: began" in await read(session, f"council://runs/{run}/tasks/t/log")
        assert "+hello" in await read(session, f"council://runs/{run}/tasks/t/diff")
        listed = [str(one.uri) for one in (await session.list_resources()).resources]
        assert listed == ["council://runs", f"council://runs/{run}"]

        merged = await call(session, "merge", run=run)
        await watch(session, merged, "ended")
    assert (repository.top / "b.txt").read_text() == "hello\n"
    events = await recorded(repository)
    assert [one.data["tool"] for one in events if one.data["tool"] != "watch"] == [
        *("plan", "start", "show", "approve", "status", "runs", "logs", "diff", "merge")
    ]
    (approved,) = (one for one in events if one.data["tool"] == "approve")
    assert approved.data["run"] == run
    assert event_text(approved).startswith("\"editor' approved")
    assert [one for one in events if not event_text(one).isprintable()] == []
    await repository.assert_invariants()


@pytest.mark.extended
async def test_run_outlives_the_server(repository: Repository, tmp_path: Path) -> None:
    """After kill -9 of the server during a run, the run lands, and another server continues at the cursor."""
    gate, pid_file = repository.spawns.parent / "gate", tmp_path / "pid"
    prompt = f"while ! test -e {gate}; do sleep 0.05; done; echo x > x.txt"
    file = repository.configure(
        [{"id": "t", "prompt": prompt}],
        adapters={"sh": {"use": "command", "argv": ["sh", "{prompt_file}"]}},
        readable=[str(gate.parent)],
    )
    async with steering(repository, pid_file) as session:
        started = await call(session, "start", file=str(file))
        os.kill(int(pid_file.read_text()), signal.SIGKILL)
    gate.touch()
    wait_for(lambda: repository.council("status", "--json").states["t"] == "landed", 60)
    async with steering(repository) as session:
        texts = await watch(session, started, "ended")
    assert any("landed" in one for one in texts), texts


@pytest.mark.extended
async def test_refused_call_is_one_line_with_the_fix(repository: Repository, tmp_path: Path) -> None:
    """And is recorded with the reason; nothing is started, and the server continues."""
    file, bad, other = (
        repository.configure([{"id": "t", "prompt": "write a a"}]),
        tmp_path / "bad.yaml",
        tmp_path / "x.yaml",
    )
    bad.write_text("version: 1\ntasks: [{id: 'a b', prompt: x, colour: red}]\n")
    other.write_text(file.read_text())
    repository.environ["COUNCIL_TRUST"] = ""
    async with steering(repository) as session:
        assert "there is no run" in await refusal(session, "status")
        assert repository.council("doctor", str(file), "--trust").code in {0, 1}
        started = await call(session, "start", file=str(file))
        await watch(session, started, "ended")
        refused = {
            "unknown tool or resource 'stat': did you mean": await refusal(session, "stat"),
            "watch: wait: ": await refusal(session, "watch", wait="long"),
            "approve: tasks: ": await refusal(session, "approve", tasks=[]),
            "its arguments are: file": await refusal(session, "start", files="x"),
            f"{bad}:2:": await refusal(session, "plan", file=str(bad)),
            "file not found": await refusal(session, "start", file="none.yaml"),
            f"council doctor {other} --trust": await refusal(session, "start", file=str(other)),
            "has no task 'none': use one of: t": await refusal(session, "tell", task="none", text="x"),
            "after the newest event": await refusal(session, "watch", cursor=1_000_000),
            "lands on main itself": await refusal(session, "merge"),
        }
        with pytest.raises(Exception, match="unknown tool or resource"):
            await read(session, "file:///etc/passwd")
        assert len((await call(session, "runs"))["runs"]) == 1
    assert [(want, found) for want, found in refused.items() if want not in found or "\n" in found] == []
    reasons = [one.data["refused"] for one in await recorded(repository) if "refused" in one.data]
    assert [want for want in refused if not any(want in one for one in reasons)] == []


async def test_documented_client_configuration_works(repository: Repository) -> None:
    """And the table of the page has all tools with their arguments."""
    from mcp import ClientSession, StdioServerParameters, stdio_client  # noqa: PLC0415  the import takes a second

    page = (Path(__file__).parents[3] / "docs/steering.md").read_text()
    (block,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    (entry,) = json.loads(block)["mcpServers"].values()
    started = StdioServerParameters(**entry, cwd=repository.top, env=repository.environ)
    async with stdio_client(started) as streams, ClientSession(*streams) as session:
        await session.initialize()
        tools = {tool.name: set(tool.input_schema.get("properties", {})) for tool in (await session.list_tools()).tools}
        templates = [one.uri_template for one in (await session.list_resource_templates()).resource_templates]
    documented = {
        name: set(re.findall(r"`(\w+)`", arguments))
        for names, arguments in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|([^|]*)\|", page, re.MULTILINE)
        for name in re.findall(r"\w+", names)
    }
    assert documented == tools
    assert [uri for uri in templates if f"`{uri}`" not in page] == []


#: Start a server as a program of a session could, and print its answer to a call: with all that a session knows, from
# the repository's folder, without the session's variables, and with the store of the run.
ATTACK = """
import json, os, subprocess, sys, tempfile
top, home, state = sys.argv[1:4]
clean = {name: value for name, value in os.environ.items() if not name.startswith("COUNCIL_")}
asked = [
    {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {"protocolVersion": "2025-06-18", "capabilities": {},
     "clientInfo": {"name": "inside", "version": "1"}}},
    {"jsonrpc": "2.0", "method": "notifications/initialized"},
    {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {"name": "status", "arguments": {}}},
]
def steer(cwd, env):
    try:
        server = subprocess.Popen([sys.executable, "-P", "-m", "orchestrator", "mcp", "--steer"], cwd=cwd, env=env,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        return str(error)
    try:
        for one in asked:
            server.stdin.write(json.dumps(one) + "\\n")
        server.stdin.flush()
        lines = [server.stdout.readline() for _ in range(2)]
    except OSError as error:
        lines = [str(error)]
    server.kill()
    return "".join(lines) + server.communicate()[1]
own = tempfile.mkdtemp()
subprocess.run(["git", "init", "--quiet", own], check=True)
found = {
    "as it is": steer(None, os.environ),
    "in its worktree, without its variables": steer(None, clean),
    "elsewhere": steer("/", os.environ),
    "elsewhere, without its variables": steer("/", clean),
    "in the repository": steer(top, {**clean, "COUNCIL_HOME": home}),
    "with the store": steer(own, {**clean, "COUNCIL_HOME": home, "COUNCIL_STATE": state}),
}
with open("found.json", "w") as file:
    json.dump(found, file)
"""


@pytest.mark.parametrize(
    "kind", [WORKING_SANDBOXES[0], *(pytest.param(one, marks=pytest.mark.extended) for one in WORKING_SANDBOXES[1:])]
)
async def test_session_cannot_steer_the_run_that_controls_it(repository: Repository, kind: str, tmp_path: Path) -> None:
    """A sandbox prevents every attempt; without one, only those of a program that keeps its variables or its folder."""
    script = tmp_path / "ledger" / "attack.py"
    script.write_text(ATTACK)
    home, state = repository.environ["COUNCIL_HOME"], f"file://{repository.top}/.council/state"
    argv = [sys.executable, str(script), str(repository.top), home, state]
    file = repository.configure(
        [{"id": "t", "prompt": "x"}],
        sandbox=str(kind),
        adapters={"agent": {"use": "command", "argv": argv}},
        readable=[sys.prefix, str(ROOT), str(script)],
    )
    ended = repository.council("run", str(file), "--json")
    assert ended.states == {"t": "landed"}, (ended, repository.council("logs", "t").stdout)
    found = json.loads(repository.git("show", "main:found.json"))
    refused = {name for name, text in found.items() if "a session cannot steer runs" in text}
    reached = {name for name, text in found.items() if '"isError":false' in text.replace(" ", "")}
    assert refused >= {"as it is", "in its worktree, without its variables", "elsewhere"}, found
    if kind == "off":
        assert reached == {"in the repository"}, found
    else:
        assert reached == set(), found
        assert await recorded(repository) == []
