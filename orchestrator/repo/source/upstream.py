"""Access the user's repository or remote: read branches, fetch, push."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import anyio

from orchestrator.repo.git.command import Git, printable_name, was_killed
from orchestrator.repo.git.reading import read_ref
from orchestrator.repo.source.checkout_update import MARK_VARIABLE, OLD_VARIABLE, TARGET_VARIABLE
from orchestrator.repo.source.user_checkouts import LocalRepository, find_checkout, find_repository, lock_marker
from orchestrator.repo.source.user_programs import UPDATE_HOOK, UPDATED_FILE, write_landing_hooks

# For the receiving side of a push to a path: a checked-out branch moves together with its files if they are clean, the
# push starts no maintenance in the user's repository, and branches hidden by its configuration are visible. The objects
# stay in a pack, which git keeps until the ref has moved: the user's `git gc --prune=now` would delete loose objects of
# a commit that no ref points to yet, and the ref would then point to a missing commit.
_RECEIVE = (
    "{environ} git -c receive.denyCurrentBranch=updateInstead -c receive.unpackLimit=1 -c receive.autogc=false"
    " -c gc.auto=0 -c core.fsmonitor=false -c receive.hideRefs='!refs/heads' -c {hooks} receive-pack"
)
# Bandwidth does not matter locally: computing new deltas would cost more than it saves.
_UPLOAD = "git -c pack.window=0 -c uploadpack.hideRefs='!refs/heads' upload-pack"

#: Messages of the remote side in addition to the porcelain output: hook output and system errors.
_REMOTE_MESSAGE = re.compile(r"remote: (?!\s*$)|error: remote unpack failed: ")
#: The same of the hook that updates a checkout: git does not prefix its output.
_HOOK_MESSAGE = re.compile(r"(?!\s*$|error: failed to push some refs to )")
#: What git says about an object folder in which it can't create a file, and about the same in other folders.
_NO_ACCESS = re.compile("Permission denied|insufficient permission|unable to create temporary object directory")
_MAX_REASON_CHARS = 300  # characters
#: A branch that does not exist, so that a push is no change of another commit.
_NO_BRANCH = "council/no-such-branch"


@dataclass(frozen=True, slots=True)
class PushResult:
    """Whether a push moved the ref; else the message and whether it was killed."""

    moved: bool
    updated_checkout: bool = False
    """Whether our hook has updated a checkout to the pushed commit."""
    reason: str = ""
    was_killed: bool = False


@dataclass(frozen=True, slots=True)
class UpstreamRepository:
    """The repository that work comes from and lands in.

    `location` is an absolute path or a URL; git runs in the trusted repository.
    """

    location: str
    is_local: bool
    git: Git
    repository: LocalRepository | None = None
    """The repository at a path, if already known."""

    @classmethod
    def of(
        cls, location: str, *, is_local: bool, git: Git, repository: LocalRepository | None = None
    ) -> UpstreamRepository:
        """Return the upstream repository, accessed with the user's own git environment."""
        return cls(location, is_local, replace(git, as_user=True), repository)

    @property
    def _upload(self) -> list[str]:
        return [f"--upload-pack={_UPLOAD}"] if self.is_local else []

    async def tip(self, branch: str) -> str | None:
        """Return the commit id of a branch; None if it does not exist."""
        if self.is_local:
            return await read_ref(Path(self.location), f"refs/heads/{branch}")
        done = await self.git("ls-remote", "--refs", self.location, f"refs/heads/{branch}")
        return done.stdout.split(b"\t")[0].decode() or None

    async def heads(self) -> dict[str, str]:
        """Return all branches with their commit ids."""
        done = await self.git("ls-remote", "--refs", "--heads", *self._upload, self.location)
        lines = [line.split("\t") for line in done.stdout.decode(errors="surrogateescape").split("\n")[:-1]]
        return {ref.removeprefix("refs/heads/"): commit for commit, ref in lines}

    async def fetch(self, branch: str, ref: str) -> str:
        """Fetch a branch, store it as `ref` in the trusted repository; return the commit."""
        return await self.fetch_ref(f"refs/heads/{branch}", ref)

    async def fetch_ref(self, name: str, ref: str) -> str:
        """Fetch any ref, store it as `ref` in the trusted repository; return the commit."""
        await self.git("fetch", "--quiet", "--no-tags", "--no-write-fetch-head", "--no-auto-maintenance",
                       "--recurse-submodules=no", *self._upload, self.location, f"+{name}:{ref}")  # fmt: skip
        return await self.git.line("rev-parse", "--verify", f"{ref}^{{commit}}")

    async def refs(self, pattern: str) -> list[str]:
        """Return the names of the refs that match a pattern."""
        done = await self.git("ls-remote", "--refs", self.location, pattern)
        return [line.split("\t")[1] for line in done.stdout.decode(errors="surrogateescape").split("\n")[:-1]]

    async def push_refs(self, refspecs: Sequence[str]) -> None:
        """Create, replace or delete refs of our own at a remote, all or none if it can. Raises GitError."""
        options = "--no-verify", "--no-signed", "--recurse-submodules=no", "--force"
        await self.git("-c", "push.pushOption=", "push", "--quiet", *options, self.location, *refspecs)

    async def push(self, new: str, branch: str, old: str | None, keep_fds: Sequence[int]) -> PushResult:
        """Move a branch from `old` (None: it must not exist) to `new`, or not at all.

        Runs the user's hooks, except those inside a checkout, which the push itself may have written. The push,
        including its receiving side for a path, holds `keep_fds` until it exits.
        """
        ref = f"refs/heads/{branch}"
        receive = [f"--receive-pack={await self._receive(branch, old)}"] if self.is_local else []
        done = await self.git(
            "-c", "push.pushOption=", "push", "--porcelain", "--no-verify", "--no-signed", "--recurse-submodules=no",
            f"--force-with-lease={ref}:{old or ''}", *receive,
            self.location, f"{new}:{ref}",
            ok=range(-64, 256), keep_fds=keep_fds,
        )  # fmt: skip
        if done.returncode == 0:
            has_updated = self.is_local and await anyio.Path(self._hooks(branch), UPDATED_FILE).exists()
            return PushResult(moved=True, updated_checkout=has_updated)
        stderr = done.stderr.decode(errors="replace")
        lines = [line for line in done.stdout.decode(errors="replace").splitlines() if line.startswith("!")]
        summary = lines[0].split("\t")[-1] if lines else " ".join(stderr.split())
        message = _HOOK_MESSAGE if f"{UPDATE_HOOK} hook declined" in summary else _REMOTE_MESSAGE
        messages = "; ".join(
            line.removeprefix("remote: ").strip() for line in stderr.splitlines() if message.match(line)
        )
        reason = summary if not lines or not messages else f"{summary}: {printable_name(messages)[:_MAX_REASON_CHARS]}"
        remedy = ": grant your user access" if _NO_ACCESS.search(messages) else ""
        return PushResult(moved=False, reason=reason + remedy, was_killed=was_killed(done.returncode, stderr))

    async def check_push(self, commit: str) -> None:
        """Raise GitError if the server does not let the user push. Pushes nothing."""
        await self.git("push", "--dry-run", "--quiet", "--no-verify", "--no-signed", "--recurse-submodules=no",
                       self.location, f"{commit}:refs/heads/{_NO_BRANCH}")  # fmt: skip

    async def _receive(self, branch: str, old: str | None) -> str:
        users = replace(self.git, git_dir=None)
        repository = self.repository or await find_repository(Path(self.location), users)
        checkout = await find_checkout(repository, branch, users)
        folder = self._hooks(branch)
        await write_landing_hooks(repository, users, folder, checkout)
        hooks = shlex.quote(f"core.hooksPath={folder}")
        given = {
            OLD_VARIABLE: old or repository.empty_tree,
            TARGET_VARIABLE: f"refs/heads/{branch}",
            MARK_VARIABLE: lock_marker(branch),
        }
        environ = " ".join(f"{name}={shlex.quote(value)}" for name, value in given.items())
        return _RECEIVE.format(environ=environ, hooks=hooks)

    def _hooks(self, branch: str) -> Path:
        """Return the hooks folder for pushes to a branch; one landing at a time uses it."""
        assert self.git.git_dir is not None, "it runs in the trusted repository"  # noqa: S101
        return self.git.git_dir / "hooks" / hashlib.sha256(branch.encode()).hexdigest()[:16]
