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
from orchestrator.repo.intake.collect import CollectionResult, collect_work
from orchestrator.repo.intake.inspection import IntakeRules
from orchestrator.repo.worktrees import worktrees
from orchestrator.repo.worktrees.files.change_detection import TreeSnapshot
from orchestrator.repo.worktrees.worktrees import Worktree
from tests.conftest import Repository
from tests.hub_fixture import HubFixture

pytestmark = pytest.mark.extended_rest

VALUE = "the-value-of-a-variable"
KEY = "gh" + "p_" + "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0fXaB3d"

RULES = IntakeRules(Redactor([VALUE]), max_file=100_000)


@dataclass(frozen=True)
class SessionWorktree:
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

    async def collect(self) -> CollectionResult:
        """Collect twice: a change found by time stamps must also be found without them, and again."""
        first = await collect_work(
            self.git, self.worktree, self.base, "work\n", rules=RULES, diff=self.snapshot.compare()
        )
        again = await collect_work(self.git, self.worktree, self.base, "work\n", rules=RULES)
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
async def session(repository: Repository, tmp_path: Path, environ: dict[str, str]) -> SessionWorktree:
    """A worktree of the repository's `main`, in a slot that another session had before."""
    repository.commit({".env.tracked": "A=1\n", "config.py": f"OLD = '{KEY}'\n", "link/x": "x\n"}, "more")
    yard = await HubFixture.of(repository.top, tmp_path / "council-home", environ)
    base = await yard.fetch()
    async with yard.open() as pool:
        _, source = await yard.begin(pool, "earlier", base)
        await yard.end(pool, yard.worktree("earlier"), source)
        worktree, checkout = await yard.begin(pool, "task", base)
        await pool.slots.detach(checkout)
    return SessionWorktree(yard.git, worktree, base, environ, checkout.contents.snapshot)


async def test_ordinary_work_is_collected_completely(session: SessionWorktree) -> None:
    """New, changed and deleted files, unusual names, links and modes are one commit; the agent's commits are kept."""
    own = session.commit("a.txt")
    session.write("-dash"), session.write("new\nline"), session.write(":(top)magic"), session.write("deep/er/x")
    (session.worktree.tree / "sym").symlink_to("/etc/passwd")
    (session.worktree.tree / "README.md").unlink()
    left = await session.collect()
    assert left == CollectionResult(left.commit)
    assert await session.tree(left.commit) == sorted(
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
    assert await session.git.line("rev-parse", f"{left.commit}^") == own


async def test_unchanged_worktree_gives_no_commit(session: SessionWorktree) -> None:
    """Neither does a file that was only touched."""
    os.utime(session.worktree.tree / ".env.tracked", (1, 1))
    assert await session.collect() == CollectionResult(None)


async def test_secret_and_huge_files_are_left_out(session: SessionWorktree) -> None:
    """They are reported, the rest is committed, none of them reaches the hub's objects, the worktree is preserved."""
    session.write("good.txt")
    session.write("new\nline/.env", "PASSWORD=hidden-by-name\n")
    session.write("deploy/server.pem", "hidden-by-name too")
    session.write("huge.bin", b"huge" * 30_000)
    session.write("value.py", f"V = '{VALUE}'\n")
    session.write("README.md", f"# Project\n{KEY[:-1]}e\n")
    session.write("-key", "-----BEGIN " + "PRIVATE KEY-----\n" + "QUJD" * 16 + "\n-----END PRIVATE KEY-----\n")
    left = await session.collect()
    assert set(left.left_out) == {"new\nline/.env", "deploy/server.pem", "huge.bin", "value.py", "README.md", "-key"}
    assert not left.complete
    assert left.refused is not None
    assert VALUE not in left.refused
    assert "huge.bin" in left.refused
    assert "good.txt" in await session.tree(left.commit)
    assert not {"huge.bin", "value.py", "-key"} & set(await session.tree(left.commit))
    assert await session.git.line("show", f"{left.commit}:README.md") == "# Project"
    for content in (b"hidden-by-name", b"hugehuge", VALUE.encode(), b"QUJDQUJD"):
        assert not await session.has(content)


async def test_secret_in_the_base_is_not_new(session: SessionWorktree) -> None:
    """A file with an old key may be edited; a tracked file for secrets may be deleted, not changed."""
    session.write("config.py", f"OLD = '{KEY}'\nNEW = 1\n")
    (session.worktree.tree / ".env.tracked").unlink()
    left = await session.collect()
    assert left == CollectionResult(left.commit)
    assert ".env.tracked" not in await session.tree(left.commit)
    session.write(".env.tracked", "B=2\n")
    left = await session.collect()
    assert left.left_out == (".env.tracked",)
    assert await session.git.line("show", f"{left.commit}:.env.tracked") == "A=1"


async def test_only_secrets_give_no_commit(session: SessionWorktree) -> None:
    """The worktree is preserved."""
    session.write(".env", "A=1\n")
    left = await session.collect()
    assert (left.commit, left.left_out, left.complete) == (None, (".env",), False)


@pytest.mark.extended_variants
@pytest.mark.parametrize("name", ["key.txt", ".env", "huge.bin", "message"])
async def test_history_with_a_secret_is_dropped(session: SessionWorktree, name: str) -> None:
    """A secret that was committed and removed does not enter through history: the files become one commit."""
    contents: dict[str, str | bytes] = {"key.txt": f"k {VALUE}\n", "huge.bin": os.urandom(150_000)}
    content = contents.get(name, "hidden-in-history\n")
    session.commit(name, content, f"say {VALUE}" if name == "message" else "work")
    (session.worktree.tree / name).unlink()
    session.commit("good.txt", "good\n")
    left = await session.collect()
    assert left.refused is None
    assert left.left_out == ()
    assert not left.complete
    assert "not kept as history" in left.notes[0]
    assert ("a file in them has more than" in left.notes[0]) == (name == "huge.bin")  # computed before it was copied
    assert "good.txt" in await session.tree(left.commit)
    assert await session.git.line("rev-parse", f"{left.commit}^") == session.base
    for hidden in (VALUE.encode(), b"hidden-in-history"):
        assert not await session.has(hidden)


async def test_other_commits_are_salvaged(session: SessionWorktree) -> None:
    """Other branches, tags, stashes and a detached HEAD get refs of their own; known commits do not."""
    session.agent("branch", "known")
    session.agent("checkout", "--quiet", "-b", "feature/x y".replace(" ", "-"))
    feature = session.commit("feature.txt")
    session.agent("checkout", "--quiet", "--detach", session.base)
    tagged = session.commit("tagged.txt")
    session.agent("tag", "--annotate", "--message", "t", "v1.0")
    detached = session.commit("detached.txt")
    session.write("stashed.txt"), session.agent("stash", "push", "--include-untracked")
    session.write("stashed2.txt"), session.agent("stash", "push", "--include-untracked")
    session.agent("checkout", "--quiet", session.worktree.branch)
    session.agent("checkout", "--quiet", "--detach", detached)
    left = await session.collect()
    root = "refs/salvage/run1/task.1/"
    found = {ref.removeprefix(root): await session.git.line("rev-parse", ref) for ref in left.salvaged}
    assert found.keys() == {"HEAD", "feature-x-y", "tags-v1-0", "stash", "stash-1"}
    assert (found["HEAD"], found["feature-x-y"], found["tags-v1-0"]) == (detached, feature, tagged)
    assert "stashed2.txt" in await session.tree(found["stash"] + "^3")
    assert left.complete


async def test_rewritten_branch_is_salvaged(session: SessionWorktree) -> None:
    """Commits of the own branch that do not continue from the base are no history, but are not lost."""
    session.agent("checkout", "--quiet", "--orphan", "other")
    orphan = session.commit("orphan.txt")
    session.agent("branch", "--force", session.worktree.branch, orphan)
    session.agent("checkout", "--quiet", session.worktree.branch)
    session.agent("branch", "-D", "other")
    left = await session.collect()
    assert left.salvaged == ("refs/salvage/run1/task.1/branch",)
    assert await session.git.line("rev-parse", left.salvaged[0]) == orphan
    assert "orphan.txt" in await session.tree(left.commit)


async def test_secrets_are_not_salvaged(session: SessionWorktree) -> None:
    """A stash with a secret stays in the session's repository, and is reported."""
    session.write("config.py", f"V = '{VALUE}'\n")
    session.agent("stash")
    session.write("good.txt")
    left = await session.collect()
    assert left.salvaged == ()
    assert "stash" in left.notes[0]
    assert VALUE not in left.notes[0]
    assert (left.refused, left.complete) == (None, False)
    assert not await session.has(VALUE.encode())


@pytest.mark.slow
async def test_salvaged_refs_are_limited(session: SessionWorktree) -> None:
    """At most 50 are salvaged; the report says that there are more."""
    tree = session.agent("rev-parse", "HEAD^{tree}")
    for number in range(52):
        commit = session.agent("commit-tree", tree, "-p", session.base, "-m", str(number))
        session.agent("update-ref", f"refs/heads/b{number:02}", commit)
    left = await session.collect()
    assert len(left.salvaged) == 50
    assert not left.complete
    assert "50" in left.notes[0]


async def test_pipes_that_git_would_open_do_not_hang(session: SessionWorktree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipes and sockets in place of git's own files are removed; a linked .gitignore stays."""
    tree = session.worktree.tree
    session.write("sub/x"), session.write("nested/.git/objects/x"), session.write("deep/.gitignore", "y\n")
    for name in (".gitattributes", "sub/.gitignore", "nested/.git/HEAD", "plain"):
        os.mkfifo(tree / name)
    (tree / "src/.gitignore").symlink_to("nowhere")
    monkeypatch.chdir(tree)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(".gitmodules")
        left = await session.collect()
    assert left.refused is None
    paths = await session.tree(left.commit)
    assert {"sub/x", "src/.gitignore", "deep/.gitignore"} <= set(paths)
    assert not {".gitattributes", ".gitmodules", "sub/.gitignore"} & set(paths)


async def test_pipes_among_session_objects_do_not_hang(session: SessionWorktree, tmp_path: Path) -> None:
    """Alternates are not followed and pipes not opened; intact objects are collected all the same."""
    own = session.commit("a.txt")
    objects, evil = session.worktree.git_dir / "objects", tmp_path / "evil"
    (evil / "info").mkdir(parents=True)
    os.mkfifo(evil / "info/alternates")
    with (objects / "info/alternates").open("a") as file:
        file.write(f"{evil}\n")
    os.mkfifo(objects / "pack" / f"pack-{own}.idx")
    os.mkfifo(objects / own[:2] / ("0" * 38))
    (session.worktree.git_dir / "refs/heads/pipe").write_text(f"{own[:2]}{'0' * 38}\n")
    (session.worktree.tree / ".gitmodules").symlink_to(evil / "info/alternates")
    left = await session.collect()
    assert left.commit == own
    assert left.complete


async def test_filters_and_hooks_of_the_agent_do_not_run(session: SessionWorktree, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    session.agent("config", "filter.f.clean", f"touch {trace}; cat")
    session.agent("config", "core.fsmonitor", f"touch {trace}")
    session.write(".gitattributes", "* filter=f\n"), session.write("a.txt")
    left = await session.collect()
    assert left.refused is None
    assert not trace.exists()


@pytest.mark.extended_variants
@pytest.mark.parametrize("where", ["refs", "refs/heads", "HEAD", "packed-refs", "git", "pipe"])
async def test_links_in_the_session_repository_are_not_followed(
    session: SessionWorktree, tmp_path: Path, where: str
) -> None:
    """No component of a path that is read may be a link, and a pipe is not waited for."""
    evil = session.commit("evil.txt")
    session.agent("checkout", "--quiet", session.base), session.agent("branch", "other", evil)
    git_dir, moved = session.worktree.git_dir, tmp_path / "moved"
    if where == "pipe":
        (git_dir / "HEAD").unlink()
        os.mkfifo(git_dir / "HEAD")
        os.mkfifo(git_dir / "refs/heads/pipe")
    else:
        path = git_dir if where == "git" else git_dir / where
        if where == "packed-refs":
            session.agent("pack-refs", "--all")
        path.rename(moved)
        path.symlink_to(moved)
    left = await session.collect()
    if where in {"refs", "refs/heads", "git", "packed-refs"}:
        assert left.commit is None
    if where in {"refs", "git", "packed-refs", "refs/heads"}:
        assert not any(ref.endswith("other") for ref in left.salvaged)


async def test_file_replacing_a_folder_and_back_is_collected(session: SessionWorktree) -> None:
    """Paths that change between file and folder are staged, and a rejected file in them does no harm."""
    tree = session.worktree.tree
    (tree / "link/x").unlink()
    (tree / "link").rmdir()
    session.write("link", f"{VALUE}\n")
    (tree / "README.md").unlink()
    session.write("README.md/.env", "A=1\n"), session.write("README.md/ok")
    left = await session.collect()
    assert set(left.left_out) == {"link", "README.md/.env"}
    paths = await session.tree(left.commit)
    assert "README.md/ok" in paths
    assert "link" not in paths


async def test_secret_file_name_without_content_is_left_out(session: SessionWorktree) -> None:
    """The name of a repository in the checkout, of an empty folder in a commit, and of a branch."""
    own = session.commit("own.txt")
    session.agent(
        "update-ref", f"refs/heads/{VALUE}", session.agent("commit-tree", "HEAD^{tree}", "-p", own, "-m", "x")
    )
    empty = session.tree_of("")
    other = session.tree_of(session.agent("ls-tree", "HEAD") + f"\n040000 tree {empty}\t{VALUE}\n")
    session.agent("update-ref", "refs/heads/other", session.agent("commit-tree", other, "-p", "HEAD", "-m", "other"))
    session.agent("init", "--quiet", VALUE)
    author = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    session.agent("-C", VALUE, *author, "commit", "--quiet", "--allow-empty", "--message", "inner")
    collected = await session.collect()
    assert collected.left_out == (VALUE,)
    assert len(collected.salvaged) == 1
    assert VALUE not in collected.salvaged[0]
    assert any("'other' was not salvaged" in note for note in collected.notes)
    listed = await session.git("ls-tree", "-r", "-t", "--name-only", collected.commit or "")
    assert b"own.txt" in listed.stdout
    assert VALUE.encode() not in listed.stdout


@pytest.mark.extended
async def test_self_expanding_tree_takes_bounded_memory(
    session: SessionWorktree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve small trees that expand to 10^12 files: the history is rejected, the files are collected."""
    monkeypatch.setattr("orchestrator.repo.git.command._MAX_MEMORY", 100 << 20)
    blob = session.agent("rev-parse", "HEAD:config.py")
    tree = session.tree_of("".join(f"100644 blob {blob}\tf{number}\n" for number in range(10)))
    for _ in range(11):
        tree = session.tree_of("".join(f"040000 tree {tree}\td{number}\n" for number in range(10)))
    bomb = session.agent("commit-tree", tree, "-p", "HEAD", "-m", "bomb")
    session.agent("reset", "--quiet", "--soft", session.agent("commit-tree", "HEAD^{tree}", "-p", bomb, "-m", "back"))
    session.write("good.txt")
    collected = await session.collect()
    assert "good.txt" in await session.tree(collected.commit)
    assert any("ut of memory" in note for note in collected.notes)
    assert not collected.complete


async def test_refs_above_the_limit_are_reported(session: SessionWorktree) -> None:
    """Commits on the last of thousands of branches are not lost silently: the worktree is preserved."""
    commit = session.commit("own.txt")
    other = session.agent("commit-tree", "HEAD^{tree}", "-p", commit, "-m", "other")
    git_dir = session.worktree.git_dir
    rows = "".join(f"{commit} refs/heads/b{number:05}\n" for number in range(3000)) + f"{other} refs/heads/last\n"
    (git_dir / "packed-refs").write_text(rows)
    collected = await session.collect()
    assert collected.salvaged == ()
    assert not collected.complete
    assert collected.notes == ("too many refs: only some were read",)


async def test_files_deeper_than_path_max_are_not_lost(session: SessionWorktree) -> None:
    """Git skips a folder that it can't open with a warning; the worktree is preserved."""
    session.write("good.txt")
    code = "import os\nfor _ in range(25):\n  os.mkdir('d' * 200); os.chdir('d' * 200)\nopen('x', 'w')"
    subprocess.run([sys.executable, "-c", code], cwd=session.worktree.tree, env=session.environ, check=True)
    collected = await session.collect()
    assert "good.txt" in await session.tree(collected.commit)
    assert "can't be opened" in (collected.refused or "")
    assert not collected.complete
    await worktrees.remove_worktree(session.worktree)


@pytest.mark.parametrize("where", ["tree", "git"])
async def test_pipe_behind_a_pointer_does_not_hang(
    session: SessionWorktree, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A `.git` that is a link, or names a folder, leads git to a pipe elsewhere."""
    monkeypatch.setattr("orchestrator.repo.intake.staging.STAGING_TIMEOUT", 5.0)
    evil = (session.worktree.tree if where == "tree" else session.worktree.git_dir) / "evil"
    for name in ("objects", "refs"):
        (evil / name).mkdir(parents=True)
    os.mkfifo(evil / "HEAD")
    session.write("one/file.txt")
    (session.worktree.tree / "one" / ".git").symlink_to(evil)
    session.write("two/.git", f"gitdir: {evil}\n")
    session.write("two/file.txt")
    collected = await session.collect()
    assert {"one/file.txt", "two/file.txt"} <= set(await session.tree(collected.commit))


_RESERVED = {
    ".council/state/00000000000000000001-00000000000099999999.jsonl": ".council",
    ".Council/store": ".council",
    "sub/.worktrees/.state/x.json": ".worktrees",
    ".g\u200cit/hooks/pre-commit": ".git",
    "git~1/config": ".git",
    "x\\.git\\config": ".git",
}


@pytest.mark.extended_variants
@pytest.mark.parametrize("name", list(_RESERVED))
async def test_file_with_a_reserved_name_is_left_out(session: SessionWorktree, name: str) -> None:
    """A .gitignore that un-ignores it does not change that."""
    session.write("good.txt")
    session.write(".gitignore", "!.council\n!.worktrees\n")
    session.write(name, "forged")
    left = await session.collect()
    assert left.left_out == (name,)
    assert left.refused is not None
    assert f"{_RESERVED[name]} is reserved" in left.refused
    tree = await session.tree(left.commit)
    assert name not in tree
    assert "good.txt" in tree
    assert not await session.has(b"forged")


@pytest.mark.parametrize(
    "entry",
    [
        '[submodule "a"]\nurl = --upload-pack=touch',
        '[submodule "a"]\npath = -x\nurl = https://example.org/a',
        '[submodule "../a"]\nurl = https://example.org/a',
        '[submodule "a"]\nupdate = !touch x',
    ],
)
async def test_gitmodules_that_git_rejects_is_left_out(session: SessionWorktree, entry: str) -> None:
    """`git fsck` would fail on the target, and a server would reject every push; a valid file is collected."""
    session.write("good.txt")
    session.write("vendored/.gitmodules", '[submodule "b"]\npath = b\nurl = https://example.org/b\n')
    session.write(".gitmodules", entry + "\n")
    left = await session.collect()
    assert left.left_out == (".gitmodules",)
    assert left.refused is not None
    assert "git rejects its `submodule." in left.refused
    assert {"good.txt", "vendored/.gitmodules"} <= set(await session.tree(left.commit))


@pytest.mark.extended_variants
@pytest.mark.parametrize("name", list(_RESERVED))
async def test_commit_with_a_reserved_name_is_left_out(session: SessionWorktree, name: str) -> None:
    """Git commands without that rule can create one; the files of the checkout become a commit without it."""
    session.write("good.txt")
    blob = session.agent("hash-object", "-w", str(session.write("forged.txt", "forged")))
    (session.worktree.tree / "forged.txt").unlink()
    rows = f"100644 blob {blob}\t{name.rpartition('/')[2]}\n"
    for folder in reversed(name.split("/")[:-1]):
        rows = f"040000 tree {session.tree_of(rows)}\t{folder}\n"
    mine = session.agent("commit-tree", session.tree_of(rows), "-p", "HEAD", "-m", "forged")
    session.agent("update-ref", f"refs/heads/{session.worktree.branch}", mine)
    left = await session.collect()
    tree = await session.tree(left.commit)
    assert name not in tree
    assert "good.txt" in tree
    assert "its own commits were not kept as history" in left.notes[0]
    assert not await session.has(b"forged")


async def test_links_to_a_name_that_is_too_long_are_collected(session: SessionWorktree) -> None:
    """Git accepts such links; in the session's git directory, they lead nowhere."""
    session.commit("mine.txt")
    for name in ("long", "src/.gitignore", "folder/link"):
        (session.worktree.tree / name).parent.mkdir(exist_ok=True)
        (session.worktree.tree / name).symlink_to("n" * 300)
    for name in ("objects/zz", "objects/pack/pack-1.pack", "refs/heads/other"):
        (session.worktree.git_dir / name).symlink_to("n" * 300)
    left = await session.collect()
    assert left.refused is None
    assert {"mine.txt", "long", "src/.gitignore", "folder/link"} <= set(await session.tree(left.commit))


@pytest.mark.extended_variants
@pytest.mark.parametrize("name", ["n" * 256, "/".join(["d" * 100] * 40)], ids=["name", "path"])
async def test_commit_with_a_name_that_is_too_long_is_left_out(session: SessionWorktree, name: str) -> None:
    """No later session could start from it, and the landing would fail in your checkout."""
    blob = session.agent("hash-object", "-w", str(session.worktree.tree / "README.md"))
    session.agent("update-index", "--add", "--cacheinfo", f"100644,{blob},{name}")
    session.agent("commit", "--quiet", "--message", "long")
    session.agent("checkout", "--quiet", "--force", session.base)
    left = await session.collect()
    assert left.commit is None
    assert "too long to be checked out" in left.notes[0]


@pytest.mark.extended_variants
@pytest.mark.parametrize("committed", [False, True])
async def test_attributes_with_git_lfs_are_left_out(session: SessionWorktree, committed: bool) -> None:
    """Otherwise its files would land as plain files, and no task and no run could start from the target."""
    session.write("good.txt"), session.write(".gitattributes", "*.txt text\n")
    session.write("deep/.gitattributes", "*.bin filter=lfs diff=lfs merge=lfs -text\n")
    if committed:
        session.agent("add", "--all"), session.agent("commit", "--quiet", "--message", "mine")
    left = await session.collect()
    assert left.left_out == ("deep/.gitattributes",)
    assert left.refused is not None
    assert "git LFS is not supported" in left.refused
    tree = await session.tree(left.commit)
    assert {"good.txt", ".gitattributes"} <= set(tree)
    assert "deep/.gitattributes" not in tree
    assert not await session.has(b"filter=lfs")


@pytest.mark.extended_variants
@pytest.mark.parametrize(
    "line",
    ["*.txt text working-tree-encoding=UTF-16", "* -working-tree-encoding", "\0\n[attr]x working-tree-encoding=x"],
)
@pytest.mark.parametrize("committed", [True, False])
async def test_attributes_with_an_encoding_are_left_out(session: SessionWorktree, line: str, committed: bool) -> None:
    """Otherwise git could not commit such files of any later session: with UTF-16, each needs a byte order mark."""
    session.write("good.md")
    session.write(".gitattributes", f"# no working-tree-encoding=UTF-16\n{line}\n")
    if committed:
        session.agent("add", ".gitattributes"), session.agent("commit", "--quiet", "--message", "mine")
    left = await session.collect()
    assert left.refused is not None
    assert "'.gitattributes': it sets `working-tree-encoding`" in left.refused
    assert left.left_out == (".gitattributes",)
    assert not await session.has(b"working-tree-encoding")
