"""No session and no earlier check can replace a program that a check runs."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import pytest

from orchestrator.repo.worktrees import worktrees
from orchestrator.repo.worktrees.checkouts import SlotState
from orchestrator.repo.worktrees.pool import SlotPool
from orchestrator.repo.worktrees.slots import list_slots, read_record
from tests.conftest import CommandResult, Repository
from tests.hub_fixture import HubFixture

pytestmark = pytest.mark.extended_rest

#: `setup` creates it: it passes if `code` is good, and its inputs are only `src` and `lock`.
JEST = "#!/bin/sh\\ngrep -qx good code\\n"
INSTALL = (
    f"mkdir -p node_modules/.bin && printf '{JEST}' > node_modules/.bin/jest && chmod +x node_modules/.bin/jest"
    " && cp lock node_modules/lock"
)
FAKE = "mkdir -p node_modules/.bin && printf '#!/bin/sh\\nexit 0\\n' > node_modules/.bin/jest"
RUN_JEST = "node_modules/.bin/jest"

#: Ways for a check's code to replace files of setup.
ATTACKS = {
    "folder": "rm -r node_modules; mkdir -p node_modules/.bin; echo exit 0 > node_modules/.bin/jest",
    "copy": "mv node_modules old; cp -a old node_modules; echo exit 0 > node_modules/.bin/jest",
    "moved": """cp node_modules/.bin/jest x; echo exit 0 > node_modules/.bin/jest; mv node_modules/.bin y
        mkdir node_modules/.bin; cp x node_modules/.bin/jest; rm -r node_modules/.bin; mv y node_modules/.bin""",
    "link": "rm node_modules/.bin/jest; ln -s /bin/true node_modules/.bin/jest",
    "times": """cp -p node_modules/.bin/jest x; echo exit 0 > node_modules/.bin/jest
        touch -r x node_modules/.bin/jest""",
    "repository": "rm node_modules/dep/run; echo exit 0 > node_modules/dep/run",
}


@pytest.fixture
def outside(repository: Repository) -> Path:
    """A folder that sessions and commands may write, to leave a trace in."""
    folder = repository.top.parent / "outside"
    folder.mkdir()
    return folder


def prepare(repository: Repository, **files: str) -> None:
    """Commit the files that are checked; `node_modules` is ignored."""
    repository.commit({".gitignore": "node_modules/\n", "code": "good\n", "lock": "1\n", **files}, "code")
    repository.remember()


def configure(repository: Repository, outside: Path, scripts: dict[str, str], **settings: Any) -> Path:
    """Configure sequential tasks that are shell scripts, checked by the program that `setup` installed."""
    listed = [{"id": name, "prompt": text, "adapter": "sh", "attempts": 1} for name, text in scripts.items()]
    for before, task in pairwise(listed):
        task["needs"] = [before["id"]]
    tasks = settings.pop("tasks", listed)
    worktrees = {
        "setup": [{"run": f"{INSTALL} && pwd >> {outside}/setups", "inputs": ["lock"]}],
        "keep_ignored": ["node_modules"],
        **settings.pop("worktrees", {}),
    }
    return repository.configure(
        tasks,
        adapters=settings.pop("adapters", {"sh": {"use": "command", "argv": ["sh", "-e", "{prompt_file}"]}}),
        writable=[str(outside)],
        worktrees=worktrees,
        defaults={"checks": [RUN_JEST], "on_checks_failed": "fail", **settings.pop("defaults", {})},
        capacity=1,
        **settings,
    )


def write(file: str, text: str) -> str:
    """Return a script that writes a file."""
    return f"cat > {file} <<'END'\n{text}\nEND\n"


def run(repository: Repository, config: Path) -> CommandResult:
    """Run a file to its end."""
    return repository.council("run", str(config), "--json")


def lines(path: Path) -> list[str]:
    """Return the lines of a trace."""
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.extended_variants
@pytest.mark.parametrize("slots", [1, 2, 4])
async def test_program_planted_in_kept_files_does_not_check_the_work(
    repository: Repository, outside: Path, slots: int
) -> None:
    """The session breaks the code and replaces the test runner; setup's own runner reports the failure."""
    prepare(repository)
    scripts = {"a": f"{FAKE}; echo bad > code"}
    ended = run(repository, configure(repository, outside, scripts, worktrees={"max": slots}))
    assert ended.states == {"a": "failed"}, ended
    assert ended.result["tasks"][0]["failure"] == "checks_failed"
    assert repository.git("show", "HEAD:code") == "good"
    await repository.assert_invariants()


@pytest.mark.extended
@pytest.mark.parametrize("slots", [1, 2])
async def test_session_replaces_nothing_that_phase_checks_run(
    repository: Repository, outside: Path, slots: int
) -> None:
    """Phase checks do not run in a session's worktree either, and never wait for one."""
    prepare(repository)
    phase = {"adapter": "sh", "until": [RUN_JEST], "max_rounds": 1, "prompt": "{{ task.prompt }}\nexit\n"}
    scripts = {"a": f"{FAKE}; echo a > a", "b": f"{FAKE}; echo bad > code"}
    config = configure(
        repository,
        outside,
        scripts,
        worktrees={"max": slots},
        workflows={"careful": [{"build": phase}]},
        defaults={"checks": [], "workflow": "careful"},
    )
    ended = run(repository, config)
    assert ended.states == {"a": "landed", "b": "failed"}, ended
    await repository.assert_invariants()


@pytest.mark.extended_variants
@pytest.mark.parametrize("slots", [1, 2, 4])
async def test_code_of_one_task_replaces_nothing_in_the_next_checks(
    repository: Repository, outside: Path, slots: int
) -> None:
    """The first check's code replaces the test runner in its own worktree; the next check finds setup's."""
    prepare(repository, tests="true\n")
    scripts = {"a": write("tests", FAKE), "b": "echo bad > code"}
    checks = [RUN_JEST, "sh tests"]
    ended = run(
        repository, configure(repository, outside, scripts, worktrees={"max": slots}, defaults={"checks": checks})
    )
    assert ended.states == {"a": "landed", "b": "failed"}, ended
    await repository.assert_invariants()


@pytest.mark.extended
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
async def test_setup_files_are_restored_after_each_check(repository: Repository, outside: Path, attack: str) -> None:
    """Also files that git does not see, in a repository that setup created inside the worktree."""
    prepare(repository, tests="true\n")
    made = "mkdir node_modules/dep; git init -q node_modules/dep; echo 'grep -qx good code' > node_modules/dep/run"
    worktrees = {"setup": [f"{INSTALL}; {made}"]}
    scripts = {"a": write("tests", f"set -e; {attack}"), "b": "echo bad > code", "c": "echo c > c"}
    checks = ["sh node_modules/.bin/jest && sh node_modules/dep/run", "sh tests"]
    ended = run(repository, configure(repository, outside, scripts, worktrees=worktrees, defaults={"checks": checks}))
    assert ended.states == {"a": "landed", "b": "failed", "c": "blocked"}, ended
    await repository.assert_invariants()


@pytest.mark.extended
async def test_setup_runs_once_for_checks_and_again_for_changed_inputs(repository: Repository, outside: Path) -> None:
    """The first check sets up the worktree of checks; files that a check adds are removed without another setup."""
    prepare(repository)
    look = "test ! -e node_modules/left; echo x > node_modules/left; mkdir -p node_modules/.cache; "
    note = f"echo $(cat a b c d e 2>/dev/null | tr -d '\\n') $PWD $(cat node_modules/lock) >> {outside}/checks"
    scripts = {"a": "echo a > a", "b": "echo b > b", "c": "echo 2 > lock", "d": "echo d > d"}
    defaults = {"checks": [RUN_JEST, look + note], "allow_failing_base": True}
    ended = run(repository, configure(repository, outside, scripts, defaults=defaults))
    assert set(ended.states.values()) == {"landed"}, ended
    seen = [line.split() for line in lines(outside / "checks")]
    assert [(work, lock) for work, _, lock in seen] == [("a", "1"), ("ab", "1"), ("ab", "2"), ("abd", "2")]
    setups = lines(outside / "setups")
    worktrees = [worktree for _, worktree, _ in seen]
    assert worktrees[0] == worktrees[1]
    assert worktrees[2] == worktrees[3] != worktrees[0], "d starts from the work that c landed"
    assert [setups.count(worktree) for worktree in dict.fromkeys(worktrees)] == [1, 1]
    run(repository, configure(repository, outside, {"e": "echo e > e"}, defaults=defaults))
    assert lines(outside / "checks")[-1].split() == ["abde", worktrees[3], "2"], "another run reuses the worktree"
    assert lines(outside / "setups").count(worktrees[3]) == 1
    repository.remember()
    await repository.assert_invariants()


async def test_run_does_not_wait_for_a_setup_that_nothing_needs(repository: Repository, outside: Path) -> None:
    """The third setup would take longer than the run."""
    setup = f"mkdir {outside}/first || mkdir {outside}/second || sleep 20"
    tasks: list[dict[str, Any]] = [
        {"id": "a", "prompt": "write a x"},
        {"id": "b", "prompt": "write b x", "needs": ["a"]},
    ]
    writable, worktrees = [str(outside)], {"setup": [setup]}
    config = repository.configure(
        tasks, capacity=2, defaults={"checks": ["true"]}, worktrees=worktrees, writable=writable
    )
    ended = run(repository, config)
    assert ended.states == {"a": "landed", "b": "landed"}, ended
    names = [line.get("event") for line in ended.lines]
    assert names.count("slot.setup_started") == 3, ended
    assert names.count("slot.setup_finished") == 2, ended


@pytest.mark.extended
async def test_unlanded_work_sets_nothing_up_for_other_checks(repository: Repository, outside: Path) -> None:
    """Setup runs a file that is not a declared input: a task's version of it has no effect on the next task."""
    prepare(repository, install=INSTALL)
    worktrees = {"setup": [{"run": "sh install", "inputs": ["lock"]}]}
    scripts = {
        "undeclared": write("install", FAKE) + "echo bad > code",
        "declared": write("install", FAKE) + "echo 2 > lock",
        "again": write("install", INSTALL) + "echo 2 > lock; echo bad > code",
    }
    tasks = [{"id": name, "prompt": script, "adapter": "sh", "attempts": 1} for name, script in scripts.items()]
    checks = [f'if test "$(cat lock)" = 2 && ! grep -q bad code; then exit 3; fi; {RUN_JEST}']
    config = configure(repository, outside, {}, tasks=tasks, worktrees=worktrees, defaults={"checks": checks})
    ended = run(repository, config)
    assert set(ended.states.values()) == {"failed"}, ended
    assert {task["failure"] for task in ended.result["tasks"]} == {"checks_failed"}
    await repository.assert_invariants()


async def test_commit_that_repairs_the_setup_passes(repository: Repository, outside: Path) -> None:
    """The target's setup is broken by an undeclared file; the commit's own version is used for its check."""
    prepare(repository, install="exit 1")
    worktrees = {"setup": [f"sh install || mkdir {outside}/base-passed || mkdir {outside}/session-passed"], "max": 1}
    scripts = {"a": write("install", INSTALL)}
    defaults = {"allow_failing_base": True}
    ended = run(repository, configure(repository, outside, scripts, worktrees=worktrees, defaults=defaults))
    assert ended.states == {"a": "landed"}, ended
    await repository.assert_invariants()


async def test_check_can_not_write_what_only_sessions_may(repository: Repository, outside: Path) -> None:
    """Folders that are writable for all are writable for checks; a session's cache is not."""
    prepare(repository)
    cache = outside.parent / "cache"
    cache.mkdir()
    checks = [f"! touch {cache}/mine && touch {outside}/mine"]
    config = configure(
        repository,
        outside,
        {"a": f"echo a > a; echo theirs > {cache}/theirs"},
        adapters={"sh": {"use": "command", "argv": ["sh", "-e", "{prompt_file}"], "writable": [str(cache)]}},
        defaults={"checks": checks},
    )
    ended = run(repository, config)
    assert ended.states == {"a": "landed"}, ended
    assert (outside / "mine").exists()
    assert sorted(path.name for path in cache.iterdir()) == ["theirs"]


@pytest.fixture
async def yard(repository: Repository, tmp_path: Path, environ: dict[str, str]) -> HubFixture:
    """A hub for a repository."""
    return await HubFixture.of(repository.top, tmp_path / "home", environ)


class TestPool:
    """Sessions and checks share the number and the size of worktree slots, and never a slot."""

    @staticmethod
    async def check(yard: HubFixture, pool: SlotPool, commit: str) -> Path:
        """Take a slot for a check and release it; return its tree."""
        worktree = replace(yard.worktree("t"), is_check=True)
        checkout = await pool.checks.acquire(commit, commit, worktree.root)
        await worktrees.create_worktree(worktree, checkout, "")
        await yard.end(pool.checks, worktree, checkout)
        return checkout.slot.tree

    @staticmethod
    async def session(yard: HubFixture, pool: SlotPool, commit: str) -> Path:
        """Take a slot for a session and release it; return its tree."""
        worktree, checkout = await yard.begin(pool, "t", commit)
        await yard.end(pool, worktree, checkout)
        return checkout.slot.tree

    @pytest.mark.parametrize("places", [2, 16])
    async def test_each_pool_has_its_own_slots(self, yard: HubFixture, places: int) -> None:
        """A slot is used again by its own kind only, also by another process."""
        commit = await yard.fetch()
        found: dict[str, set[Path]] = {"session": set(), "check": set()}
        for _ in range(2):
            async with yard.open(slots=places, warm=1, warm_checks=1) as pool:
                for _ in range(3):
                    found["session"].add(await self.session(yard, pool, commit))
                    found["check"].add(await self.check(yard, pool, commit))
        assert [len(one) for one in found.values()] == [1, 1]
        assert not found["session"] & found["check"]

    @pytest.mark.parametrize(("places", "size"), [(1, None), (16, 1)])
    async def test_idle_slot_of_the_other_pool_is_discarded_for_a_new_one(
        self, yard: HubFixture, places: int, size: int | None
    ) -> None:
        """With capacity for one slot they take turns, each in a new one."""
        commit = await yard.fetch()
        async with yard.open(slots=places, size=size and await self.size(yard, commit)) as pool:
            for _ in range(2):
                await self.session(yard, pool, commit)
                assert await self.kinds(yard, pool) == [False]
                await self.check(yard, pool, commit)
                assert await self.kinds(yard, pool) == [True]

    @pytest.mark.parametrize(("places", "size"), [(1, None), (16, 1)])
    async def test_check_never_waits_for_a_session(self, yard: HubFixture, places: int, size: int | None) -> None:
        """Even if there is no capacity for another slot: the session may be waiting for the check."""
        commit = await yard.fetch()
        async with yard.open(slots=places, size=size and await self.size(yard, commit)) as pool:
            worktree, checkout = await yard.begin(pool, "t", commit)
            assert await self.check(yard, pool, commit) != checkout.slot.tree
            assert checkout.slot.tree.is_dir()
            await yard.end(pool, worktree, checkout)

    @staticmethod
    async def size(yard: HubFixture, commit: str) -> int:
        """Return the size of a slot in bytes."""
        async with yard.open(slots=1, size=1_000_000_000) as pool:
            await TestPool.session(yard, pool, commit)
        (slot,) = list_slots(yard.hub)
        record = read_record(slot)
        assert record is not None
        return record.bytes

    @staticmethod
    async def kinds(yard: HubFixture, pool: SlotPool) -> list[bool]:
        """Return for each slot whether it is for checks, when all are idle."""
        while any(each.slots.in_state(SlotState.CLEANING) for each in (pool, pool.checks)):
            await anyio.sleep(0)
        ours = {**pool.slots.by_number, **pool.checks.slots.by_number}
        assert sorted(ours) == [slot.number for slot in list_slots(yard.hub)]
        return [one.contents.record.is_check for one in ours.values()]
