"""Merge conflicts between running sessions are predicted from their unfinished files."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from orchestrator import Council
from orchestrator.domain.sessions.contexts import SessionStatus
from orchestrator.repo.landing import trial_merges
from orchestrator.repo.worktrees.files import write_watch
from tests.conftest import Repository
from tests.hub_fixture import HubFixture
from tests.trial_sessions import PAIR, Edit, open_trial_sessions
from tests.waiting import wait_for

pytestmark = pytest.mark.extended_rest

LINES = "".join(f"line {number}\n" for number in range(30))


@pytest.fixture
async def fixture(repository: Repository, tmp_path: Path, environ: dict[str, str]) -> HubFixture:
    """Return the hub of a repository with a folder, a binary file and ignored files."""
    (repository.top / "picture").write_bytes(bytes(range(256)) * 8)
    repository.commit({"a.txt": LINES, "src/b.txt": LINES, "src/c.txt": f"c{LINES}", ".gitignore": "*.o\nbuilt/\n"})
    return await HubFixture.of(repository.top, tmp_path / "council-home", environ)


def replace_line(path: str, number: int, text: str) -> Edit:
    """Return an edit of one line."""

    def edit(tree: Path) -> None:
        lines = (tree / path).read_text().splitlines()
        lines[number] = text
        (tree / path).write_text("\n".join(lines) + "\n")

    return edit


def write(path: str, content: str | bytes) -> Edit:
    """Return an edit that writes a file."""

    def edit(tree: Path) -> None:
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(content.encode() if isinstance(content, str) else content)

    return edit


def move(path: str, to: str) -> Edit:
    """Return an edit that renames a file or folder."""
    return lambda tree: os.renames(tree / path, tree / to)


def delete(path: str) -> Edit:
    """Return an edit that deletes a file or folder."""
    return lambda tree: shutil.rmtree(tree / path) if (tree / path).is_dir() else (tree / path).unlink()


def link(path: str, to: str) -> Edit:
    """Return an edit that creates a link."""
    return lambda tree: (tree / path).symlink_to(to)


def both(*edits: Edit) -> Edit:
    """Return all of these edits as one."""

    def edit(tree: Path) -> None:
        for each in edits:
            each(tree)

    return edit


@pytest.mark.parametrize("is_watched", [True, False])
@pytest.mark.parametrize(
    ("one", "other", "paths"),
    [
        pytest.param(replace_line("a.txt", 3, "x"), replace_line("a.txt", 3, "y"), {"a.txt"}, id="same line"),
        pytest.param(replace_line("a.txt", 3, "x"), replace_line("a.txt", 20, "y"), None, id="other lines"),
        pytest.param(replace_line("a.txt", 3, "x"), replace_line("a.txt", 3, "x"), None, id="same change"),
        pytest.param(replace_line("a.txt", 3, "x"), replace_line("src/b.txt", 3, "y"), None, id="other files"),
        pytest.param(delete("a.txt"), replace_line("a.txt", 3, "x"), {"a.txt"}, id="deleted and modified"),
        pytest.param(write("new.txt", "x\n"), write("new.txt", "y\n"), {"new.txt"}, id="added twice"),
        pytest.param(write("n/e/w.txt", "x\n"), write("n/e/w.txt", "y\n"), {"n/e/w.txt"}, id="added in a new folder"),
        pytest.param(write("n", "x\n"), write("n/e/w.txt", "y\n"), {"n"}, id="file and folder"),
        pytest.param(both(delete("src"), write("src", "x\n")), write("src/new", "y\n"), {"src"}, id="folder to file"),
        pytest.param(write("picture", b"\0x"), write("picture", b"\0y"), {"picture"}, id="binary"),
        pytest.param(move("a.txt", "z.txt"), replace_line("a.txt", 3, "y"), None, id="renamed and modified"),
        pytest.param(
            both(move("a.txt", "z.txt"), replace_line("z.txt", 3, "x")), replace_line("a.txt", 3, "y"), {"z.txt"},
            id="renamed with the same line",
        ),
        pytest.param(move("a.txt", "z.txt"), move("a.txt", "y.txt"), {"a.txt", "y.txt", "z.txt"}, id="renamed twice"),
        pytest.param(move("a.txt", "z.txt"), delete("a.txt"), {"z.txt"}, id="renamed and deleted"),
        pytest.param(move("src", "lib"), write("src/new.txt", "x\n"), {"lib/new.txt"}, id="folder renamed"),
        pytest.param(link("l", "a.txt"), link("l", "src"), {"l"}, id="links"),
        pytest.param(write("x.o", "x"), write("x.o", "y"), None, id="ignored"),
        pytest.param(write("src/built/x", "x"), write("src/built/x", "y"), None, id="ignored folder"),
    ],
)  # fmt: skip
async def test_conflict_of_each_kind_is_predicted(
    fixture: HubFixture, one: Edit, other: Edit, paths: set[str] | None, is_watched: bool
) -> None:
    """From events of the kernel and from comparisons; no further conflicts are predicted."""
    async with open_trial_sessions(fixture, is_watched=is_watched) as sessions:
        if is_watched:
            assert await sessions.predict() is None, "watched from now on"
        one(sessions.one)
        other(sessions.other)
        found = await sessions.predict()
    assert (None if found is None else set(found)) == paths


async def test_predicted_conflict_ends_with_its_cause(fixture: HubFixture) -> None:
    """After further changes, also in folders that were created or moved in the meantime."""
    async with open_trial_sessions(fixture) as sessions:
        steps: list[tuple[Edit, Edit, tuple[str, ...] | None]] = [
            (write("n/e/w.txt", "x\n"), write("n/e/w.txt", "y\n"), ("n/e/w.txt",)),
            (write("n/e/w.txt", "y\n"), both(), None),
            (write("n/e/w.txt", "z\n"), both(), ("n/e/w.txt",)),
            (move("n", "m"), both(), None),
            (both(), move("n/e", "m/e"), ("m/e/w.txt",)),
            (delete("m"), both(), None),
            (replace_line("src/b.txt", 3, "x"), replace_line("src/b.txt", 3, "y"), ("src/b.txt",)),
            (write("src/b.txt", LINES), both(), None),
        ]
        for one, other, paths in steps:
            one(sessions.one)
            other(sessions.other)
            assert await sessions.predict() == paths


async def test_lost_events_are_replaced_by_a_comparison(fixture: HubFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_trial_sessions(fixture) as sessions:
        assert await sessions.predict() is None
        write("new.txt", "x\n")(sessions.one)
        write("new.txt", "y\n")(sessions.other)
        monkeypatch.setattr(write_watch.FolderWatch, "read", lambda self: iter([None]))
        monkeypatch.setattr("orchestrator.repo.intake.live_files._SCAN_SHARE", 1e9)
        for session in sessions.live._sessions.values():
            assert session.files is not None
            session.files._next_scan = 0
        assert await sessions.predict() == ("new.txt",)


async def test_unusual_names_are_merged(fixture: HubFixture) -> None:
    """With quotes, newlines, backslashes, and bytes that are not UTF-8."""
    name = os.fsdecode(b'a "b"\n\\c\xff.txt')
    async with open_trial_sessions(fixture) as sessions:
        write(name, "x\n")(sessions.one)
        write(name, "y\n")(sessions.other)
        assert await sessions.predict() == ('a "b"\n\\c\\xff.txt',)


async def test_no_link_leads_out_of_the_checkout(fixture: HubFixture, tmp_path: Path) -> None:
    """A folder that an agent replaced with a link has no files, and pipes block nothing."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "b.txt").write_text("secret\n")
    async with open_trial_sessions(fixture) as sessions:
        shutil.rmtree(sessions.one / "src")
        (sessions.one / "src").symlink_to(secret)
        os.mkfifo(sessions.one / "pipe")
        os.mkfifo(sessions.other / "pipe")
        write("src/new.txt", "y\n")(sessions.other)
        assert await sessions.predict() == ("src",)
        listed = await sessions.trials.git("ls-tree", "-r", sessions.live._sessions[PAIR[0]].commit.id)
        assert [line.split()[0] for line in listed.stdout.splitlines() if line.endswith(b"\tsrc")] == [b"120000"]
        assert b"pipe" not in listed.stdout


async def test_merges_without_batches_have_the_same_results(fixture: HubFixture) -> None:
    """As with git 2.38: for a conflict, for one of a rename and a removal, and for a clean merge."""
    async with open_trial_sessions(fixture) as sessions:
        sessions.trials._merges_batches = False
        replace_line("a.txt", 3, "x")(sessions.one)
        replace_line("a.txt", 3, "y")(sessions.other)
        assert await sessions.predict() == ("a.txt",)
        move("a.txt", "z.txt")(sessions.one)
        delete("a.txt")(sessions.other)
        assert await sessions.predict() == ("z.txt",)
        delete("z.txt")(sessions.one)
        assert await sessions.predict() is None


async def test_cost_does_not_grow_with_earlier_changes(fixture: HubFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaced commits and the results of merges are deleted, and no commit follows another one of its session."""
    monkeypatch.setattr(trial_merges, "_MAX_PACKS", 3)
    async with open_trial_sessions(fixture) as sessions:
        for number in range(9):
            replace_line("a.txt", 3, f"x{number}")(sessions.one)
            replace_line("a.txt", 3, "y")(sessions.other)
            assert await sessions.predict() == ("a.txt",)
            assert len(list(sessions.trials.folder.glob("git/objects/pack/*.pack"))) <= 4
            assert len(list(sessions.trials.folder.glob("results/??/*"))) <= 12
        for one in sessions.live._sessions.values():
            assert await sessions.trials.git.line("rev-list", "--count", f"{one.base}..{one.commit.id}") == "1"


async def test_emptied_checkout_is_merged(fixture: HubFixture) -> None:
    """Also after further changes: its tree is empty in between."""
    async with open_trial_sessions(fixture) as sessions:
        assert await sessions.predict() is None
        for name in {path.name for path in sessions.one.iterdir()} - {".git"}:
            delete(name)(sessions.one)
        replace_line("a.txt", 3, "y")(sessions.other)
        assert await sessions.predict() == ("a.txt",)
        write("a.txt", LINES)(sessions.one)
        write("new.txt", "x\n")(sessions.one)
        write("new.txt", "y\n")(sessions.other)
        assert await sessions.predict() == ("new.txt",)


async def test_changes_of_other_files_start_no_git(fixture: HubFixture) -> None:
    """Nothing is committed before both change one file, and a file that was renamed over it needs no ignore rules."""
    async with open_trial_sessions(fixture) as sessions:
        assert await sessions.predict() is None
        write("new", LINES.replace("3", "x"))(sessions.one)
        (sessions.one / "new").replace(sessions.one / "a.txt")
        replace_line("src/b.txt", 3, "y")(sessions.other)
        assert await sessions.predict() is None
        one, other = sessions.live._sessions.values()
        assert {one.commit.id, other.commit.id} == {one.base}
        assert one.files is not None
        assert one.files._new == set()
        replace_line("a.txt", 3, "y")(sessions.other)
        assert await sessions.predict() == ("a.txt",)


async def test_folder_renamed_by_a_built_task_is_compared(fixture: HubFixture) -> None:
    """With a file that a running session adds to the folder under its old name."""
    async with open_trial_sessions(fixture) as sessions:
        assert await sessions.predict() is None
        write("src/new.txt", "x\n")(sessions.other)
        base = sessions.live._sessions[PAIR[0]].base
        entries = (await fixture.git.line("ls-tree", base)).replace("\tsrc", "\tlib")
        tree = await fixture.git.line("mktree", input_=entries.encode())
        built = await fixture.git.line("commit-tree", tree, "-p", base, "-m", "built")
        await sessions.live.follow_commit(PAIR[0], base, built)
        assert await sessions.predict() == ("lib/new.txt",)


async def test_file_renamed_on_the_target_is_compared(fixture: HubFixture) -> None:
    """One session changes it under its old name, and built work from a later commit of the target under the new one."""
    async with open_trial_sessions(fixture) as sessions:
        assert await sessions.predict() is None
        replace_line("a.txt", 3, "y")(sessions.other)
        base, git = sessions.live._sessions[PAIR[0]].base, fixture.git
        commits = [base]
        for content in (LINES, LINES.replace("line 3\n", "x\n")):
            entries = [line for line in (await git.line("ls-tree", base)).splitlines() if not line.endswith("\ta.txt")]
            entries.append(
                f"100644 blob {await git.line('hash-object', '-w', '--stdin', input_=content.encode())}\tz.txt"
            )
            tree = await git.line("mktree", input_="".join(f"{entry}\n" for entry in entries).encode())
            commits.append(await git.line("commit-tree", tree, "-p", commits[-1], "-m", "work"))
        await sessions.live.follow_commit(PAIR[0], commits[1], commits[2])
        assert await sessions.predict() == ("z.txt",)


async def test_temporary_repository_is_removed(fixture: HubFixture) -> None:
    async with open_trial_sessions(fixture) as sessions:
        folder = sessions.trials.folder
        assert folder.is_dir()
    assert not folder.exists()


async def test_running_sessions_learn_of_their_conflict(repository: Repository) -> None:
    """Within five seconds of the write: in the status, in the list, in Python, as notes and as events of both tasks."""
    repository.commit({"a.txt": LINES})
    tasks = [{"id": name, "prompt": f"write a.txt {name}\nhang"} for name in ("auth", "web")]
    child = repository.start("run", str(repository.configure(tasks)))
    try:
        wait_for(lambda: repository.spawns.exists() and len(repository.spawns.read_text().splitlines()) == 2)
        since = time.monotonic()
        wait_for(lambda: "a.txt" in repository.council("conflicts").stdout, 60)
        took = time.monotonic() - since
        async with Council.open(repository.top, environ=repository.environ) as council:
            [predicted] = await council.sessions.predicted_conflicts()
            assert predicted == (("auth", "web"), ("a.txt",))
            assert {one.task: one.conflicts for one in await council.sessions.list()} == {
                "auth": {"web": ("a.txt",)},
                "web": {"auth": ("a.txt",)},
            }
            notes = await council.notes.list()
            assert sorted((note.task, note.topic, note.paths) for note in notes) == [
                ("auth", "conflict", ("a.txt",)),
                ("web", "conflict", ("a.txt",)),
            ]
            assert all("unfinished changes of task" in note.text for note in notes)
        assert "conflicts with web in a.txt" in repository.council("status").stdout
        result = repository.council("conflicts", "--json").result
        assert result["conflicts"] == [{"tasks": ["auth", "web"], "paths": ["a.txt"]}]
        [one, other] = repository.council("status", "--json").result["sessions"]
        assert (one["conflicts"], other["conflicts"]) == ({"web": ["a.txt"]}, {"auth": ["a.txt"]})
    finally:
        child.send_signal(signal.SIGINT)
        out, _ = child.communicate(timeout=60)
    assert took < 30, "five seconds on an idle machine"
    async with Council.open(repository.top, environ=repository.environ) as council:
        assert await council.sessions.predicted_conflicts() == []
        assert {one.status for one in await council.sessions.list()} == {SessionStatus.DONE}
    assert out.count("merge conflict with web predicted in a.txt") == 1
    assert out.count("merge conflict with auth predicted in a.txt") == 1
