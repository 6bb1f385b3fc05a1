"""Sessions that plant configuration, hooks, links, alternates and refs, which our git commands never run or follow."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Repository
from tests.faults import SHELL_ADAPTER, read_objects
from tests.sandboxes import default_sandbox
from tests.waiting import wait_for

pytestmark = pytest.mark.sandbox

CANARY = "canary-of-a-private-file"
#: Keys with a program that some git command runs.
PROGRAM_KEYS = (
    "core.fsmonitor", "core.sshCommand", "core.editor", "core.pager", "core.askPass", "core.alternateRefsCommand",
    "core.gitProxy", "credential.helper", "diff.external", "diff.evil.command", "diff.evil.textconv",
    "filter.evil.clean", "filter.evil.smudge", "filter.evil.process", "merge.evil.driver", "merge.tool", "gpg.program",
    "gpg.ssh.program", "uploadpack.packObjectsHook", "remote.origin.uploadpack", "remote.origin.receivepack",
    "trailer.evil.cmd", "sequence.editor", "interactive.diffFilter", "pager.diff", "pager.log", "alias.diff-index",
)  # fmt: skip
HOOKS = (
    "pre-commit", "post-checkout", "post-commit", "post-index-change", "post-merge", "post-rewrite", "pre-push",
    "reference-transaction", "pre-receive", "update", "post-receive", "post-update", "push-to-checkout",
    "fsmonitor-watchman", "pre-auto-gc", "proc-receive",
)  # fmt: skip
ATTRIBUTES = "* filter=evil diff=evil merge=evil ident"

START = """\
G=$(git rev-parse --absolute-git-dir) B=$(git rev-parse HEAD)
printf '#!/bin/sh\\necho "$0 $*" >> {marker}\\ncat\\n' > "$G/evil"; chmod +x "$G/evil"; E=$G/evil
"""
#: Each plants something, and makes an ordinary change.
ATTACKS = {
    "programs": """\
for key in {keys}; do git config $key "$E"; done
git config commit.gpgSign true; git config diff.trustExitCode true; git config status.submoduleSummary true
printf '{attributes}\\n' > .gitattributes; printf '{attributes}\\n' > "$G/info/attributes"
""",
    "hooks": """\
mkdir -p hooks "$G/hooks"
for hook in {hooks}; do cp "$E" hooks/$hook; cp "$E" "$G/hooks/$hook"; done
git config core.hooksPath "$PWD/hooks"
""",
    "promisor": """\
git config core.repositoryFormatVersion 1; git config extensions.partialClone origin
git config remote.origin.promisor true; git config protocol.ext.allow always; git config protocol.allow always
git config remote.origin.url "ext::sh -c touch% {marker}"; git config remote.origin.fetch "+refs/*:refs/*"
mkdir -p "$G/objects/pack"; touch "$G/objects/pack/pack-$B.promisor"
printf 'tree %040d\\nparent %s\\nauthor a <a@b> 1 +0000\\ncommitter a <a@b> 1 +0000\\n\\nx\\n' 1 $B > "$G/raw"
C=$(git hash-object -t commit -w --literally "$G/raw"); git update-ref refs/heads/missing $C; echo $C > "$G/HEAD"
""",
    "alternates": """\
mkdir -p "$G/objects/info"; echo {private}/.git/objects >> "$G/objects/info/alternates"
printf 'tree {tree}\\nparent %s\\nauthor a <a@b> 1 +0000\\ncommitter a <a@b> 1 +0000\\n\\nx\\n' $B > "$G/raw"
C=$(git hash-object -t commit -w --literally "$G/raw")
for ref in $(git for-each-ref --format='%(refname)' refs/heads) refs/heads/stolen refs/tags/stolen; do
    echo $C > "$G/$ref"; done
""",
    "objects": """\
P={private}/.git/objects
for name in $(ls $P | grep '^..$'); do [ -e "$G/objects/$name" ] || ln -s $P/$name "$G/objects/$name"; done
printf 'tree {tree}\\nparent %s\\nauthor a <a@b> 1 +0000\\ncommitter a <a@b> 1 +0000\\n\\nx\\n' $B > "$G/raw"
C=$(git hash-object -t commit -w --literally "$G/raw"); echo $C > "$G/refs/heads/stolen"
""",
    "refs": """\
ln -s {private}/.git/refs/heads/main "$G/refs/heads/linked"; ln -s {private}/.git/refs "$G/refs/heads/all"
for name in '--upload-pack=touch {flat}' '--output={flat}' '-x' 'a b' '@{{u}}' 'x;touch {flat}'; do
    printf '%s\\n' $B > "$G/refs/heads/$name"; done
printf '%s\\n' "ref: ../../../../private/.git/refs/heads/main" > "$G/refs/heads/symbolic"
git replace -f $B $(git commit-tree -m replaced "$(git mktree < /dev/null)"); echo "$B" > "$G/shallow"
mkdir -p "$G/info"; echo "$B" > "$G/info/grafts"
""",
    "config": """\
git config include.path {private}/config; git config core.worktree {private}; git config core.bare true
git config extensions.worktreeConfig true; printf '[core]\\n\\tfsmonitor = %s\\n' "$E" > "$G/config.worktree"
echo {private}/.git > "$G/commondir"; echo {private}/.git > "$G/gitdir"
git config core.excludesFile {private}/secret.txt; git config core.attributesFile {private}/secret.txt
git config mailmap.file {private}/secret.txt; git config index.sparse true; git config core.splitIndex true
""",
    "links": """\
rm -rf src; ln -s {private} src; ln -s {private}/secret.txt link.txt
[ -n "{unconfined}" ] || ln {private}/secret.txt hard.txt
rm -f .gitignore; ln -s {private}/secret.txt .gitignore; ln -s {private}/secret.txt .gitattributes
ln -s {private}/secret.txt .mailmap; mkdir -p "$G/info"; rm -f "$G/info/exclude"
ln -s {private}/secret.txt "$G/info/exclude"
""",
    "pointer": """\
rm -rf .git; mkdir .git; cp -r {private}/.git/. .git 2>/dev/null; git init -q .
git config core.fsmonitor "$E"; git config core.hooksPath "$PWD/.git/hooks"
for hook in {hooks}; do cp "$E" .git/hooks/$hook; done
""",
    "submodules": """\
printf '[submodule "sub"]\\n\\tpath = sub\\n\\turl = ext::sh -c touch%% {marker}\\n' > .gitmodules
printf '\\tupdate = !touch {marker}\\n' >> .gitmodules
git config submodule.sub.url "ext::sh -c touch% {marker}"; git config submodule.recurse true
git config submodule.sub.update "!touch {marker}"; git update-index --add --cacheinfo 160000,$B,sub
mkdir -p sub "$G/modules/sub"; cp -r "$G/config" "$G/modules/sub/config"; echo "gitdir: $G/modules/sub" > sub/.git
git -c user.name=a -c user.email=a@b commit -qm sub
""",
}  # fmt: skip


class Trap:
    """A marker that planted programs write, and a private repository that only the user reads."""

    def __init__(self, folder: Path, repository: Repository) -> None:
        """Create the private repository in `folder`."""
        self.marker, self.private = folder / "marker", folder / "private"
        self.private.mkdir()
        for name in ("secret.txt", "a.txt"):
            (self.private / name).write_text(f"{CANARY} {name}\n")
        (self.private / "config").write_text(f"[alias]\n\tst = !touch {self.marker}\n")

        def git(*arguments: str) -> str:
            identity = ("-c", "user.name=u", "-c", "user.email=u@example.org")
            command = ["git", *identity, *arguments]
            done = subprocess.run(
                command, cwd=self.private, env=repository.environ, check=True, capture_output=True, text=True
            )
            return done.stdout.strip()

        git("init", "--quiet", "--initial-branch=main")
        git("add", "--all")
        git("commit", "--quiet", "--message=private")
        self.tree = git("rev-parse", "HEAD^{tree}")

    @property
    def flat(self) -> str:
        """The name of the marker as a file in the current folder."""
        return str(self.marker).replace("/", ".")

    def copies(self, folder: Path) -> list[Path]:
        """Return the files below a folder with private content, without links to it."""
        files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        return [path for path in files if self.private not in path.parents and CANARY.encode() in path.read_bytes()]

    def script(self, attack: str) -> str:
        """Return the prompt of a session with an attack and an ordinary change."""
        values = {
            "marker": self.marker,
            "flat": self.flat,
            "private": self.private,
            "unconfined": default_sandbox().get("sandbox", ""),  # such a session could copy the file, too
            "tree": self.tree,
            "keys": " ".join(PROGRAM_KEYS),
            "hooks": " ".join(HOOKS),
            "attributes": ATTRIBUTES,
        }
        return f"{(START + ATTACKS[attack]).format(**values)}echo x > {attack}.txt\n"


@pytest.mark.extended_variants
@pytest.mark.parametrize("attack", ATTACKS)
async def test_planted_git_files_run_nothing_and_read_nothing(
    repository: Repository, tmp_path: Path, attack: str
) -> None:
    """Neither while the session runs, nor when its work is collected, landed, shown, saved, applied or cleaned up."""
    repository.commit({"src/a.txt": "a\n", "src/b.txt": "b\n"}, "files")
    repository.remember()
    trap, gate = Trap(tmp_path, repository), repository.spawns.parent / "gate"
    gate.parent.mkdir(exist_ok=True)
    prompt = f"{trap.script(attack)}touch {gate}.begun\nwhile [ ! -e {gate} ]; do sleep 0.1; done\n"
    tasks: list[dict[str, Any]] = [
        {"id": "planter", "prompt": prompt, "attempts": 1},
        {"id": "next", "prompt": "echo y > next.txt"},
    ]
    settings = default_sandbox() | {"writable": [str(gate.parent)]}
    config = repository.configure(tasks, adapters={"sh": SHELL_ADAPTER}, **settings)
    child = repository.start("run", str(config), "--json")
    wait_for(Path(f"{gate}.begun").exists, 60)
    for command in ("diff planter", "diff planter --stat", "show planter", "status", "context --json"):
        repository.council(*command.split())
    gate.touch()
    out, _ = child.communicate(timeout=120)
    states = {one["id"]: one["status"] for one in json.loads(out.splitlines()[-1])["tasks"]}
    await repository.assert_invariants()
    for number, one in enumerate(repository.council("salvage", "list", "--json").result["preserved"]):
        repository.council("salvage", "show", one["name"])
        repository.council("salvage", "apply", one["name"], "--branch", f"kept-{number}")
    for command in ("diff planter", "show planter", "check", "state verify", "clean --yes"):
        repository.council(*command.split())
    assert not trap.marker.exists(), trap.marker.read_text()
    assert not list(tmp_path.rglob(f"*{trap.flat}"))
    assert trap.copies(tmp_path) == []
    for objects in (repository.top, *(tmp_path / "council-home").glob("*/*.git")):
        assert CANARY.encode() not in read_objects(objects), objects
    assert states["next"] == "landed", out
