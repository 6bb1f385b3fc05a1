"""Files that sessions leave at `$COUNCIL_HANDOFF`: written inside each sandbox, read with care."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import anyio
import pytest

from orchestrator import Council, RefusedError
from orchestrator.client.commands import MAX_HANDOFF_BYTES
from orchestrator.protocols import SessionCommand
from orchestrator.repo.worktrees import worktrees
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.sandbox.policy import SandboxKind
from orchestrator.sessions.setup.environment import build_session_environment
from orchestrator.sessions.setup.handoff_file import HANDOFF_VARIABLE, HandoffData, MalformedHandoff, read_handoff
from tests.conftest import Repository
from tests.fake_session_service import FakeSessionService
from tests.hub_fixture import HubFixture
from tests.integration.sessions.test_session_socket import KINDS, Site
from tests.sandboxes import require_sandbox

pytestmark = pytest.mark.sandbox


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> SandboxKind:
    """A sandbox kind that works here, or none."""
    return require_sandbox(request.param)


@pytest.fixture
def worktree(tmp_path: Path) -> Worktree:
    """The folders of an ended session."""
    made = Worktree(Hub(tmp_path / "hub"), "run-1", "t", 1)
    made.handoff_file.parent.mkdir(parents=True)
    return made


async def test_session_has_a_handoff_folder(repository: Repository) -> None:
    """It is created and removed with the session, and the environment has its path."""
    yard = await HubFixture.of(repository.top, Path(repository.environ["COUNCIL_HOME"]), repository.environ)
    base = await yard.fetch()
    async with yard.open() as pool:
        worktree = yard.worktree("t")
        checkout = await pool.acquire(base, worktree.root)
        worktree = await worktrees.create_worktree(worktree, checkout, "prompt")
        folder = worktree.handoff_file.parent
        assert (folder.is_dir(), folder.stat().st_mode & 0o777, list(folder.iterdir())) == (True, 0o700, [])
        env = build_session_environment(SessionCommand(["x"], env={HANDOFF_VARIABLE: "/elsewhere"}), {}, worktree, {})
        assert env[HANDOFF_VARIABLE] == str(worktree.handoff_file)
        assert await read_handoff(worktree) is None
        worktree.handoff_file.write_text("{}")
        assert await read_handoff(worktree) == HandoffData({})
        await yard.end(pool, worktree, checkout)
        assert not folder.exists()
        assert await read_handoff(worktree) is None


WRITE = """
import json, os, sys
said = {}
for name in sys.argv[1:]:
    try:
        with open(name, "w") as file:
            file.write('{"by": "the program"}')
        said[name] = True
    except OSError:
        said[name] = False
print(json.dumps(said))
"""


@pytest.mark.extended_variants
async def test_sandboxed_program_writes_its_own_handoff_only(tmp_path: Path, kind: SandboxKind) -> None:
    """Neither another session's handoff nor the prompt."""
    hub = Hub(tmp_path / "hub")
    hub.root.mkdir()
    site = Site(hub, FakeSessionService())
    async with site.session() as (first, session_socket), site.session("api", 2) as (second, _):
        for one in (first, second):
            one.handoff_file.parent.mkdir()
        names = [str(one) for one in (first.handoff_file, second.handoff_file, first.prompt_file)]
        code, said = await site.run(kind, first, session_socket, [sys.executable, "-I", "-S", "-c", WRITE, *names])
        assert code == 0, said
        is_off = kind is SandboxKind.OFF
        assert json.loads(said) == {names[0]: True, names[1]: is_off, names[2]: is_off}
        assert await read_handoff(first) == HandoffData({"by": "the program"})
        assert await read_handoff(second) == (HandoffData({"by": "the program"}) if is_off else None)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not valid JSON"),
        (b"# a plan\n", "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": 1, "a": 2}', "'a' twice"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"{" + b" " * (MAX_HANDOFF_BYTES - 1) + b"}", f"exceeds the limit of {MAX_HANDOFF_BYTES} bytes"),
    ],
    ids=range(7),
)
async def test_handoff_that_is_not_an_object_is_reported(worktree: Worktree, data: bytes, why: str) -> None:
    worktree.handoff_file.write_bytes(data)
    found = await read_handoff(worktree)
    assert isinstance(found, MalformedHandoff)
    assert why in found.reason
    assert f"${HANDOFF_VARIABLE}" in found.reason


async def test_largest_handoff_is_read(worktree: Worktree) -> None:
    data = {"a": "x" * (MAX_HANDOFF_BYTES - len('{"a": ""}'))}
    worktree.handoff_file.write_text(json.dumps(data))
    assert worktree.handoff_file.stat().st_size == MAX_HANDOFF_BYTES
    assert await read_handoff(worktree) == HandoffData(data)


@pytest.mark.parametrize("what", ["link", "hard link", "pipe", "folder", "socket", "linked folder", "file for folder"])
async def test_only_regular_files_are_read(worktree: Worktree, tmp_path: Path, what: str) -> None:
    """Any other file type is not followed, and not waited for."""
    file, secret = worktree.handoff_file, tmp_path / "secret.json"
    secret.write_text('{"password": "x"}')
    match what:
        case "link":
            file.symlink_to(secret)
        case "hard link":
            file.hardlink_to(secret)
        case "pipe":
            os.mkfifo(file)
        case "folder":
            file.mkdir()
        case "socket":
            os.mknod(file, 0o140600)
        case "linked folder":
            file.parent.rmdir()
            (tmp_path / "elsewhere").mkdir()
            secret.rename(tmp_path / "elsewhere" / file.name)
            file.parent.symlink_to(tmp_path / "elsewhere")
        case "file for folder":
            file.parent.rmdir()
            file.parent.write_text("{}")
    with anyio.fail_after(10):
        found = await read_handoff(worktree)
    assert isinstance(found, MalformedHandoff)
    assert "password" not in found.reason


async def test_sessions_share_values_that_a_person_can_list(repository: Repository) -> None:
    """One session waits for a value of another; from outside it can be read, changed, and waited for."""
    script = {"use": "command", "argv": ["sh", "-e", "{prompt_file}"]}
    odd = "! council submit-handoff /dev/null 2> err.txt\necho '{}' | council submit-handoff 2>> err.txt || true"
    config = repository.configure(
        [
            {"id": "reads", "prompt": "council share wait greeting --timeout 60 > got.txt"},
            {"id": "puts", "prompt": 'council share put greeting \'{"text": "hello"}\' > put.txt'},
            {"id": "errs", "prompt": odd},
        ],
        adapters={"sh": script},
        readable=[sys.prefix, str(Path(worktrees.__file__).parents[1])],
    )
    ended = repository.council("run", str(config), "--json")
    assert ended.states == {"reads": "landed", "puts": "landed", "errs": "landed"}, ended
    assert json.loads((repository.top / "got.txt").read_text()) == {"text": "hello"}
    assert "no result to submit" in (repository.top / "err.txt").read_text()
    async with Council.open(config) as council:
        (entry,) = await (await council.sessions.shared_values()).list()
    assert (entry.key, entry.version, entry.writer) == ("greeting", 1, f"{ended.result['run']}/puts.1")
    await repository.assert_invariants()


async def test_person_can_list_and_put_shared_values(repository: Repository) -> None:
    """Outside of sessions by the run's name; a rejection is an input error."""
    config = repository.configure([{"id": "t", "prompt": "write a.txt x"}])
    async with Council.open(config) as council:
        run = await council.runs.create()
        await (await council.sessions.shared_values()).put("greeting", {"text": "hello"})
        assert repository.council("share", "get", "greeting", "--run", run).stdout == '{\n  "text": "hello"\n}\n'
        put = repository.council("share", "put", "greeting", "bye", "--if-version", "1")
        assert (put.code, put.stdout) == (0, "shared greeting: version 2\n")
        (entry,) = repository.council("share", "list", "--json").result["shared"]
        assert (entry["key"], entry["version"], entry["writer"]) == ("greeting", 2, None)
        assert entry["size"] == len('"bye"')
        late = repository.council("share", "wait", "greeting", "--after", "2", "--timeout", "0.1", "--json")
        assert (late.code, late.result["status"]) == (2, "refused")
        assert repository.council("share", "put", "greeting", "{", "--run", run).code == 2
        with pytest.raises(RefusedError, match="none"):
            await council.sessions.shared_values("none")
