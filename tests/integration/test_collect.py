"""Collecting a session's changes without secrets, huge files and anything that would hang or mislead us."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.domain.security.secrets import Redactor
from orchestrator.repo.git.command import Git
from orchestrator.repo.intake.collect import CollectedWork, collect_work
from orchestrator.repo.intake.inspection import IntakeRules
from orchestrator.repo.worktrees import worktrees
from orchestrator.repo.worktrees.change_detection import TreeSnapshot
from orchestrator.repo.worktrees.worktrees import Worktree
from tests.conftest import Repository
from tests.hub_fixture import HubFixture

VALUE = "the-value-of-a-variable"
KEY = "gh" + "p_" + "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0fXaB3d"

ADMIT = IntakeRules(Redactor([VALUE]), max_file=100_000)


@dataclass(frozen=True)
class Place:
    """A worktree as a session leaves it, and the agent's commands in it."""

    git: Git
    worktree: Worktree
    base: str
    environ: Mapping[str, str]
    snapshot: TreeSnapshot

    def agent(self, *arguments: str) -> str:
        """Run git as the agent would."""
        done = subprocess.run(
            ["git", *arguments], cwd=self.worktree.tree, env=self.environ, check=True, capture_output=True
        )
        return done.stdout.decode().strip()

    def tree_of(self, rows: str) -> str:
        """Create a tree in the session's repository as `git mktree` does."""
        command = ["git", "mktree"]
        done = subprocess.run(
            command, cwd=self.worktree.tree, env=self.environ, input=rows.encode(), check=True, capture_output=True
        )
        return done.stdout.decode().strip()

    def write(self, name: str, content: str | bytes = "text\n") -> Path:
        """Write a file in the worktree."""
        path = self.worktree.tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def commit(self, name: str, content: str | bytes = "text\n", message: str = "work") -> str:
        """Write and commit a file as the agent would."""
        self.write(name, content)
        self.agent("add", "--all")
        self.agent("commit", "--quiet", "--message", message)
        return self.agent("rev-parse", "HEAD")

    async def collect(self) -> CollectedWork:
        """Collect twice: a change found by time stamps must also be found without them, and again."""
        first = await collect_work(
            self.git, self.worktree, self.base, "work\n", admit=ADMIT, diff=self.snapshot.compare()
        )
        again = await collect_work(self.git, self.worktree, self.base, "work\n", admit=ADMIT)
        assert await self.tree(first.commit) == await self.tree(again.commit)
        assert (first.refused, first.left_out, first.salvaged) == (again.refused, again.left_out, again.salvaged)
        checked = await self.git("fsck", "--no-dangling", "--connectivity-only")
        assert not checked.returncode
        return first

    async def tree(self, commit: str | None) -> list[str]:
        """Return the paths of a commit."""
        if commit is None:
            return []
        listed = await self.git("ls-tree", "-r", "-z", "--name-only", commit)
        return listed.stdout.decode(errors="surrogateescape").split("\0")[:-1]

    async def has(self, content: bytes) -> bool:
        """Return whether any object of the hub has this content."""
        done = await self.git("cat-file", "--batch-all-objects", "--batch")
        return content in done.stdout


@pytest.fixture
async def place(repository: Repository, tmp_path: Path, environ: dict[str, str]) -> Place:
    """A worktree of the repository's `main`, in a slot that another session had before."""
    repository.commit({".env.tracked": "A=1\n", "config.py": f"OLD = '{KEY}'\n", "link/x": "x\n"}, "more")
    yard = await HubFixture.of(repository.top, tmp_path / "council-home", environ)
    base = await yard.fetch()
    async with yard.open() as pool:
        _, source = await yard.begin(pool, "earlier", base)
        await yard.end(pool, yard.worktree("earlier"), source)
        worktree, checkout = await yard.begin(pool, "task", base)
        await pool.detach(checkout)
    return Place(yard.git, worktree, base, environ, checkout.contents.snapshot)


async def test_ordinary_work_is_collected_completely(place: Place) -> None:
    """New, changed and deleted files, unusual names, links and modes are one commit; the agent's commits are kept."""
    own = place.commit("a.txt")
    place.write("-dash"), place.write("new\nline"), place.write(":(top)magic"), place.write("deep/er/x")
    (place.worktree.tree / "sym").symlink_to("/etc/passwd")
    (place.worktree.tree / "README.md").unlink()
    left = await place.collect()
    assert left == CollectedWork(left.commit)
    assert await place.tree(left.commit) == sorted(
        [
            ".env.tracked",
            "-dash",
            ":(top)magic",
            "a.txt",
            "config.py",
            "deep/er/x",
            "link/x",
            "new\nline",
            "src/app.py",
            "sym",
        ]
    )
    assert await place.git.line("rev-parse", f"{left.commit}^") == own


async def test_unchanged_worktree_gives_no_commit(place: Place) -> None:
    """Neither does a file that was only touched."""
    os.utime(place.worktree.tree / ".env.tracked", (1, 1))
    assert await place.collect() == CollectedWork(None)


async def test_secret_and_huge_files_are_left_out(place: Place) -> None:
    """They are reported, the rest is committed, none of them reaches the hub's objects, the worktree is preserved."""
    place.write("good.txt")
    place.write("new\nline/.env", "PASSWORD=hidden-by-name\n")
    place.write("deploy/server.pem", "hidden-by-name too")
    place.write("huge.bin", b"huge" * 30_000)
    place.write("value.py", f"V = '{VALUE}'\n")
    place.write("README.md", f"# Project\n{KEY[:-1]}e\n")
    place.write("-key", "-----BEGIN " + "PRIVATE KEY-----\n" + "QUJD" * 16 + "\n-----END PRIVATE KEY-----\n")
    left = await place.collect()
    assert set(left.left_out) == {"new\nline/.env", "deploy/server.pem", "huge.bin", "value.py", "README.md", "-key"}
    assert not left.complete
    assert left.refused is not None
    assert VALUE not in left.refused
    assert "huge.bin" in left.refused
    assert "good.txt" in await place.tree(left.commit)
    assert not {"huge.bin", "value.py", "-key"} & set(await place.tree(left.commit))
    assert await place.git.line("show", f"{left.commit}:README.md") == "# Project"
    for content in (b"hidden-by-name", b"hugehuge", VALUE.encode(), b"QUJDQUJD"):
        assert not await place.has(content)


async def test_secret_in_the_base_is_not_new(place: Place) -> None:
    """A file with an old key may be edited; a tracked file for secrets may be deleted, not changed."""
    place.write("config.py", f"OLD = '{KEY}'\nNEW = 1\n")
    (place.worktree.tree / ".env.tracked").unlink()
    left = await place.collect()
    assert left == CollectedWork(left.commit)
    assert ".env.tracked" not in await place.tree(left.commit)
    place.write(".env.tracked", "B=2\n")
    left = await place.collect()
    assert left.left_out == (".env.tracked",)
    assert await place.git.line("show", f"{left.commit}:.env.tracked") == "A=1"


async def test_only_secrets_give_no_commit(place: Place) -> None:
    """The worktree is preserved."""
    place.write(".env", "A=1\n")
    left = await place.collect()
    assert (left.commit, left.left_out, left.complete) == (None, (".env",), False)


@pytest.mark.extended_but_first
@pytest.mark.parametrize("name", ["key.txt", ".env", "huge.bin", "message"])
async def test_history_with_a_secret_is_dropped(place: Place, name: str) -> None:
    """A secret that was committed and removed does not enter through history: the files become one commit."""
    contents: dict[str, str | bytes] = {"key.txt": f"k {VALUE}\n", "huge.bin": os.urandom(150_000)}
    content = contents.get(name, "hidden-in-history\n")
    place.commit(name, content, f"say {VALUE}" if name == "message" else "work")
    (place.worktree.tree / name).unlink()
    place.commit("good.txt", "good\n")
    left = await place.collect()
    assert left.refused is None
    assert left.left_out == ()
    assert not left.complete
    assert "not kept as history" in left.notes[0]
    assert ("a file in them has more than" in left.notes[0]) == (name == "huge.bin")  # computed before it was copied
    assert "good.txt" in await place.tree(left.commit)
    assert await place.git.line("rev-parse", f"{left.commit}^") == place.base
    for hidden in (VALUE.encode(), b"hidden-in-history"):
        assert not await place.has(hidden)


async def test_other_commits_are_salvaged(place: Place) -> None:
    """Other branches, tags, stashes and a detached HEAD get refs of their own; known commits do not."""
    place.agent("branch", "known")
    place.agent("checkout", "--quiet", "-b", "feature/x y".replace(" ", "-"))
    feature = place.commit("feature.txt")
    place.agent("checkout", "--quiet", "--detach", place.base)
    tagged = place.commit("tagged.txt")
    place.agent("tag", "--annotate", "--message", "t", "v1.0")
    detached = place.commit("detached.txt")
    place.write("stashed.txt"), place.agent("stash", "push", "--include-untracked")
    place.write("stashed2.txt"), place.agent("stash", "push", "--include-untracked")
    place.agent("checkout", "--quiet", place.worktree.branch)
    place.agent("checkout", "--quiet", "--detach", detached)
    left = await place.collect()
    root = "refs/salvage/run1/task.1/"
    found = {ref.removeprefix(root): await place.git.line("rev-parse", ref) for ref in left.salvaged}
    assert found.keys() == {"HEAD", "feature-x-y", "tags-v1-0", "stash", "stash-1"}
    assert (found["HEAD"], found["feature-x-y"], found["tags-v1-0"]) == (detached, feature, tagged)
    assert "stashed2.txt" in await place.tree(found["stash"] + "^3")
    assert left.complete


async def test_rewritten_branch_is_salvaged(place: Place) -> None:
    """Commits of the own branch that do not continue from the base are no history, but are not lost."""
    place.agent("checkout", "--quiet", "--orphan", "other")
    orphan = place.commit("orphan.txt")
    place.agent("branch", "--force", place.worktree.branch, orphan)
    place.agent("checkout", "--quiet", place.worktree.branch)
    place.agent("branch", "-D", "other")
    left = await place.collect()
    assert left.salvaged == ("refs/salvage/run1/task.1/branch",)
    assert await place.git.line("rev-parse", left.salvaged[0]) == orphan
    assert "orphan.txt" in await place.tree(left.commit)


async def test_secrets_are_not_salvaged(place: Place) -> None:
    """A stash with a secret stays in the session's repository, and is reported."""
    place.write("config.py", f"V = '{VALUE}'\n")
    place.agent("stash")
    place.write("good.txt")
    left = await place.collect()
    assert left.salvaged == ()
    assert "stash" in left.notes[0]
    assert VALUE not in left.notes[0]
    assert (left.refused, left.complete) == (None, False)
    assert not await place.has(VALUE.encode())


@pytest.mark.slow
async def test_salvaged_refs_are_limited(place: Place) -> None:
    """At most 50 are salvaged; the report says that there are more."""
    tree = place.agent("rev-parse", "HEAD^{tree}")
    for number in range(52):
        commit = place.agent("commit-tree", tree, "-p", place.base, "-m", str(number))
        place.agent("update-ref", f"refs/heads/b{number:02}", commit)
    left = await place.collect()
    assert len(left.salvaged) == 50
    assert not left.complete
    assert "50" in left.notes[0]


async def test_pipes_that_git_would_open_do_not_hang(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipes and sockets in place of git's own files are removed; a linked .gitignore stays."""
    tree = place.worktree.tree
    place.write("sub/x"), place.write("nested/.git/objects/x"), place.write("deep/.gitignore", "y\n")
    for name in (".gitattributes", "sub/.gitignore", "nested/.git/HEAD", "plain"):
        os.mkfifo(tree / name)
    (tree / "src/.gitignore").symlink_to("nowhere")
    monkeypatch.chdir(tree)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(".gitmodules")
        left = await place.collect()
    assert left.refused is None
    paths = await place.tree(left.commit)
    assert {"sub/x", "src/.gitignore", "deep/.gitignore"} <= set(paths)
    assert not {".gitattributes", ".gitmodules", "sub/.gitignore"} & set(paths)


async def test_pipes_among_session_objects_do_not_hang(place: Place, tmp_path: Path) -> None:
    """Alternates are not followed and pipes not opened; intact objects are collected all the same."""
    own = place.commit("a.txt")
    objects, evil = place.worktree.git_dir / "objects", tmp_path / "evil"
    (evil / "info").mkdir(parents=True)
    os.mkfifo(evil / "info/alternates")
    with (objects / "info/alternates").open("a") as file:
        file.write(f"{evil}\n")
    os.mkfifo(objects / "pack" / f"pack-{own}.idx")
    os.mkfifo(objects / own[:2] / ("0" * 38))
    (place.worktree.git_dir / "refs/heads/pipe").write_text(f"{own[:2]}{'0' * 38}\n")
    (place.worktree.tree / ".gitmodules").symlink_to(evil / "info/alternates")
    left = await place.collect()
    assert left.commit == own
    assert left.complete


async def test_filters_and_hooks_of_the_agent_do_not_run(place: Place, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    place.agent("config", "filter.f.clean", f"touch {trace}; cat")
    place.agent("config", "core.fsmonitor", f"touch {trace}")
    place.write(".gitattributes", "* filter=f\n"), place.write("a.txt")
    left = await place.collect()
    assert left.refused is None
    assert not trace.exists()


@pytest.mark.extended_but_first
@pytest.mark.parametrize("where", ["refs", "refs/heads", "HEAD", "packed-refs", "git", "pipe"])
async def test_links_in_the_session_repository_are_not_followed(place: Place, tmp_path: Path, where: str) -> None:
    """No component of a path that is read may be a link, and a pipe is not waited for."""
    evil = place.commit("evil.txt")
    place.agent("checkout", "--quiet", place.base), place.agent("branch", "other", evil)
    git_dir, moved = place.worktree.git_dir, tmp_path / "moved"
    if where == "pipe":
        (git_dir / "HEAD").unlink()
        os.mkfifo(git_dir / "HEAD")
        os.mkfifo(git_dir / "refs/heads/pipe")
    else:
        path = git_dir if where == "git" else git_dir / where
        if where == "packed-refs":
            place.agent("pack-refs", "--all")
        path.rename(moved)
        path.symlink_to(moved)
    left = await place.collect()
    if where in {"refs", "refs/heads", "git", "packed-refs"}:
        assert left.commit is None
    if where in {"refs", "git", "packed-refs", "refs/heads"}:
        assert not any(ref.endswith("other") for ref in left.salvaged)


async def test_file_replacing_a_folder_and_back_is_collected(place: Place) -> None:
    """Paths that change between file and folder are staged, and a rejected file in them does no harm."""
    tree = place.worktree.tree
    (tree / "link/x").unlink()
    (tree / "link").rmdir()
    place.write("link", f"{VALUE}\n")
    (tree / "README.md").unlink()
    place.write("README.md/.env", "A=1\n"), place.write("README.md/ok")
    left = await place.collect()
    assert set(left.left_out) == {"link", "README.md/.env"}
    paths = await place.tree(left.commit)
    assert "README.md/ok" in paths
    assert "link" not in paths


async def test_secret_file_name_without_content_is_left_out(place: Place) -> None:
    """The name of a repository in the checkout, of an empty folder in a commit, and of a branch."""
    own = place.commit("own.txt")
    place.agent("update-ref", f"refs/heads/{VALUE}", place.agent("commit-tree", "HEAD^{tree}", "-p", own, "-m", "x"))
    empty = place.tree_of("")
    other = place.tree_of(place.agent("ls-tree", "HEAD") + f"\n040000 tree {empty}\t{VALUE}\n")
    place.agent("update-ref", "refs/heads/other", place.agent("commit-tree", other, "-p", "HEAD", "-m", "other"))
    place.agent("init", "--quiet", VALUE)
    author = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    place.agent("-C", VALUE, *author, "commit", "--quiet", "--allow-empty", "--message", "inner")
    collected = await place.collect()
    assert collected.left_out == (VALUE,)
    assert len(collected.salvaged) == 1
    assert VALUE not in collected.salvaged[0]
    assert any("'other' is not salvaged" in note for note in collected.notes)
    listed = await place.git("ls-tree", "-r", "-t", "--name-only", collected.commit or "")
    assert b"own.txt" in listed.stdout
    assert VALUE.encode() not in listed.stdout


@pytest.mark.extended
async def test_self_expanding_tree_takes_bounded_memory(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve small trees that expand to 10^12 files: the history is rejected, the files are collected."""
    monkeypatch.setattr("orchestrator.repo.git.command._MAX_MEMORY", 100 << 20)
    blob = place.agent("rev-parse", "HEAD:config.py")
    tree = place.tree_of("".join(f"100644 blob {blob}\tf{number}\n" for number in range(10)))
    for _ in range(11):
        tree = place.tree_of("".join(f"040000 tree {tree}\td{number}\n" for number in range(10)))
    bomb = place.agent("commit-tree", tree, "-p", "HEAD", "-m", "bomb")
    place.agent("reset", "--quiet", "--soft", place.agent("commit-tree", "HEAD^{tree}", "-p", bomb, "-m", "back"))
    place.write("good.txt")
    collected = await place.collect()
    assert "good.txt" in await place.tree(collected.commit)
    assert any("ut of memory" in note for note in collected.notes)
    assert not collected.complete


async def test_refs_above_the_limit_are_reported(place: Place) -> None:
    """Commits on the last of thousands of branches are not lost silently: the worktree is preserved."""
    commit = place.commit("own.txt")
    other = place.agent("commit-tree", "HEAD^{tree}", "-p", commit, "-m", "other")
    git_dir = place.worktree.git_dir
    rows = "".join(f"{commit} refs/heads/b{number:05}\n" for number in range(3000)) + f"{other} refs/heads/last\n"
    (git_dir / "packed-refs").write_text(rows)
    collected = await place.collect()
    assert collected.salvaged == ()
    assert not collected.complete
    assert collected.notes == ("it has too many refs: only some were read",)


async def test_files_deeper_than_path_max_are_not_lost(place: Place) -> None:
    """Git skips a folder that it can't open with a warning; the worktree is preserved."""
    place.write("good.txt")
    code = "import os\nfor _ in range(25):\n  os.mkdir('d' * 200); os.chdir('d' * 200)\nopen('x', 'w')"
    subprocess.run([sys.executable, "-c", code], cwd=place.worktree.tree, env=place.environ, check=True)
    collected = await place.collect()
    assert "good.txt" in await place.tree(collected.commit)
    assert "can't be opened" in (collected.refused or "")
    assert not collected.complete
    await worktrees.remove_worktree(place.worktree)


@pytest.mark.parametrize("where", ["tree", "git"])
async def test_pipe_behind_a_pointer_does_not_hang(place: Place, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """A `.git` that is a link, or names a folder, leads git to a pipe elsewhere."""
    monkeypatch.setattr("orchestrator.repo.intake.staging.STAGING_TIMEOUT", 5.0)
    evil = (place.worktree.tree if where == "tree" else place.worktree.git_dir) / "evil"
    for name in ("objects", "refs"):
        (evil / name).mkdir(parents=True)
    os.mkfifo(evil / "HEAD")
    place.write("one/file.txt")
    (place.worktree.tree / "one" / ".git").symlink_to(evil)
    place.write("two/.git", f"gitdir: {evil}\n")
    place.write("two/file.txt")
    collected = await place.collect()
    assert {"one/file.txt", "two/file.txt"} <= set(await place.tree(collected.commit))


_RESERVED = {
    ".council/state/00000000000000000001-00000000000099999999.jsonl": ".council",
    ".Council/store": ".council",
    "sub/.worktrees/.state/x.json": ".worktrees",
    ".g\u200cit/hooks/pre-commit": ".git",
    "git~1/config": ".git",
    "x\\.git\\config": ".git",
}


@pytest.mark.extended_but_first
@pytest.mark.parametrize("name", list(_RESERVED))
async def test_file_with_a_reserved_name_is_left_out(place: Place, name: str) -> None:
    """A .gitignore that un-ignores it does not change that."""
    place.write("good.txt")
    place.write(".gitignore", "!.council\n!.worktrees\n")
    place.write(name, "forged")
    left = await place.collect()
    assert left.left_out == (name,)
    assert left.refused is not None
    assert f"{_RESERVED[name]} is reserved" in left.refused
    tree = await place.tree(left.commit)
    assert name not in tree
    assert "good.txt" in tree
    assert not await place.has(b"forged")


@pytest.mark.parametrize(
    "entry",
    [
        '[submodule "a"]\nurl = --upload-pack=touch',
        '[submodule "a"]\npath = -x\nurl = https://example.org/a',
        '[submodule "../a"]\nurl = https://example.org/a',
        '[submodule "a"]\nupdate = !touch x',
    ],
)
async def test_gitmodules_that_git_rejects_is_left_out(place: Place, entry: str) -> None:
    """`git fsck` would fail on the target, and a server would reject every push; a valid file is collected."""
    place.write("good.txt")
    place.write("vendored/.gitmodules", '[submodule "b"]\npath = b\nurl = https://example.org/b\n')
    place.write(".gitmodules", entry + "\n")
    left = await place.collect()
    assert left.left_out == (".gitmodules",)
    assert left.refused is not None
    assert "git rejects its `submodule." in left.refused
    assert {"good.txt", "vendored/.gitmodules"} <= set(await place.tree(left.commit))


@pytest.mark.extended_but_first
@pytest.mark.parametrize("name", list(_RESERVED))
async def test_commit_with_a_reserved_name_is_left_out(place: Place, name: str) -> None:
    """Git commands without that rule can create one; the files of the checkout become a commit without it."""
    place.write("good.txt")
    blob = place.agent("hash-object", "-w", str(place.write("forged.txt", "forged")))
    (place.worktree.tree / "forged.txt").unlink()
    rows = f"100644 blob {blob}\t{name.rpartition('/')[2]}\n"
    for folder in reversed(name.split("/")[:-1]):
        rows = f"040000 tree {place.tree_of(rows)}\t{folder}\n"
    mine = place.agent("commit-tree", place.tree_of(rows), "-p", "HEAD", "-m", "forged")
    place.agent("update-ref", f"refs/heads/{place.worktree.branch}", mine)
    left = await place.collect()
    tree = await place.tree(left.commit)
    assert name not in tree
    assert "good.txt" in tree
    assert "its own commits are not kept as history" in left.notes[0]
    assert not await place.has(b"forged")
