"""Programs in the user's checkout that git would run on a landing: never those that it may have written."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.domain.runs.model import PreparedMerge
from orchestrator.engine.diagnostics.preflight import check_checkout
from orchestrator.errors import RefusedError
from orchestrator.repo.git.command import Git
from orchestrator.repo.landing.target_branch import DeferredLanding, Landed, Target
from orchestrator.repo.source.run_repository import find_run_repository
from orchestrator.repo.source.user_programs import find_hooks_in_checkouts
from orchestrator.repo.worktrees.hub import create_hub, locate_hub
from tests.conftest import Repository
from tests.faults import SHELL_ADAPTER
from tests.merge_leases import hold_merge_lease

pytestmark = pytest.mark.extended

HOOKS = ("pre-receive", "update", "post-receive", "post-update", "reference-transaction", "post-index-change",
         "post-checkout", "post-merge", "push-to-checkout")  # fmt: skip


async def land(
    repository: Repository, tmp_path: Path, files: dict[str, str], before: Callable[[], object] = lambda: None
) -> Landed | DeferredLanding | object:
    """Land a commit with executable files on the checked-out `main`, by the push of a run; do `before` first."""
    start = repository.git("rev-parse", "HEAD")
    for name, content in files.items():
        path = repository.top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(content)
        path.chmod(0o755)
    tree = _tree(repository)
    repository.git("-c", "core.hooksPath=/dev/null", "reset", "--quiet", "--hard", start)
    repository.git("clean", "-fdq")
    site = await find_run_repository(str(repository.top), is_url=False, environ=repository.environ)
    hub = locate_hub(site.location, tmp_path / "hubs")
    await create_hub(hub, site.object_format, repository.environ)
    git = Git(hub.trusted, environ=repository.environ)
    source = site.source(git)
    await source.fetch("main", "refs/council/base")
    (hub.objects / "info" / "alternates").write_text(f"{site.repository.git_dir}/objects\n")  # type: ignore[union-attr]
    new = await git.line("commit-tree", tree, "-p", start, input_=b"work\n")
    target = Target(hub, git, source, branch="main", start=start, ref="refs/council/target")
    await target.refresh()
    merge = PreparedMerge(old=start, new=new)
    before()
    obstacle = await target.find_obstacle(merge)
    if obstacle is not None:
        return DeferredLanding(obstacle)
    async with hold_merge_lease(source, "main") as lease:
        return await target.move(lease, [merge])


def _tree(repository: Repository) -> str:
    repository.git("-c", "core.hooksPath=/dev/null", "add", "--all")
    return repository.git("-c", "core.hooksPath=/dev/null", "write-tree")


def in_tree(repository: Repository, tmp_path: Path) -> str:
    repository.git("config", "core.hooksPath", ".githooks")
    return ".githooks"


def absolute(repository: Repository, tmp_path: Path) -> str:
    repository.git("config", "core.hooksPath", str(repository.top / ".husky/_"))
    return ".husky/_"


def home(repository: Repository, tmp_path: Path) -> str:
    (Path(repository.environ["HOME"]) / "link").symlink_to(repository.top)
    repository.git("config", "core.hooksPath", "~/link/hooks")
    return "hooks"


def included(repository: Repository, tmp_path: Path) -> str:
    (tmp_path / "included").write_text(f"[core]\n\thooksPath = {repository.top}/tools/hooks\n")
    repository.git("config", f"includeIf.gitdir:{repository.top}/.git.path", str(tmp_path / "included"))
    return "tools/hooks"


def linked(repository: Repository, tmp_path: Path) -> str:
    """Link each hook of `.git/hooks` to a file that the landing brings."""
    folder = repository.top / ".git/hooks"
    folder.mkdir(exist_ok=True)
    for name in HOOKS:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(Path("../../scripts", name))
    return "scripts"


def through_tracked_link(repository: Repository, tmp_path: Path) -> str:
    """The folder is outside, but its path contains a tracked link, which a landing can replace with a folder."""
    (tmp_path / "outside").mkdir()
    (repository.top / ".githooks").symlink_to(tmp_path / "outside")
    repository.git("add", ".githooks")
    repository.git("commit", "--quiet", "--message", "link")
    repository.git("config", "core.hooksPath", str(repository.top / ".githooks"))
    (repository.top / ".githooks").unlink()
    return ".githooks"


@pytest.mark.parametrize("way", [in_tree, absolute, home, included, linked, through_tracked_link])
async def test_landing_runs_no_hook_that_it_just_wrote(repository: Repository, tmp_path: Path, way: object) -> None:
    """However the user's configuration leads to it."""
    assert callable(way)
    folder, trace = way(repository, tmp_path), tmp_path / "trace"
    script = f'#!/bin/sh\necho "$0" >> "{trace}"\n'
    landed = await land(repository, tmp_path, {f"{folder}/{name}": script for name in HOOKS})
    assert isinstance(landed, Landed), landed
    assert (repository.top / folder / "update").read_text() == script
    assert not trace.exists(), trace.read_text()
    site = await find_run_repository(str(repository.top), is_url=False, environ=repository.environ)
    assert site.repository is not None
    assert await find_hooks_in_checkouts(site.repository, Git(None, as_user=True, environ=repository.environ))


async def test_hook_in_another_checkout_is_not_run(repository: Repository, tmp_path: Path) -> None:
    """Agents' work may have landed there too."""
    trace, other = tmp_path / "trace", tmp_path / "other"
    repository.git("worktree", "add", "--quiet", str(other), "-b", "other")
    (other / "hooks").mkdir()
    (other / "hooks/update").write_text(f'#!/bin/sh\necho ran >> "{trace}"\n')
    (other / "hooks/update").chmod(0o755)
    repository.git("config", "core.hooksPath", str(other / "hooks"))
    assert isinstance(await land(repository, tmp_path, {"a.txt": "a"}), Landed)
    assert not trace.exists()


async def test_hooks_outside_of_the_checkouts_run(repository: Repository, tmp_path: Path) -> None:
    """By their own names, and a commit that a hook rejects does not land."""
    trace, folder = tmp_path / "trace", repository.top / ".git/hooks"
    folder.mkdir(exist_ok=True)
    for name in ("update", "post-receive"):
        (folder / name).write_text(f'#!/bin/sh\necho "$0" "$#" >> "{trace}"\n')
        (folder / name).chmod(0o755)
    assert isinstance(await land(repository, tmp_path, {"a.txt": "a"}), Landed)
    assert [line.split("/")[-1] for line in trace.read_text().splitlines()] == ["update 3", "post-receive 0"]
    trace.unlink()
    (folder / "pre-receive").symlink_to("../../evil")
    landed = await land(repository, tmp_path, {"evil": f'#!/bin/sh\necho evil >> "{trace}"\n'})
    assert isinstance(landed, Landed), landed
    assert trace.read_text().splitlines() == [f"{folder}/update 3", f"{folder}/post-receive 0"]
    (folder / "update").write_text("#!/bin/sh\necho 'index.lock: Permission denied' >&2\nexit 1\n")
    refused = await land(repository, tmp_path, {"b.txt": "b"})
    assert isinstance(refused, DeferredLanding)
    for part in ("hook declined", "index.lock: Permission denied", ": grant your user access"):
        assert part in refused.reason


@pytest.mark.extended_variants
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (".git/objects", "unable to create temporary object directory: grant your user access"),
        (".git", "index.lock: Permission denied: grant your user access"),
        (".", "can't write a.txt: Permission denied: grant your user access"),
    ],
)
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="root ignores permissions without setpriv")
async def test_unwritable_folder_is_reported_with_the_fix(
    repository: Repository, tmp_path: Path, name: str, message: str
) -> None:
    """Git names it in a message of its own side; the output of the hook that updates the checkout has no prefix."""
    folder, programs = repository.top / name, tmp_path / "programs"
    programs.mkdir()
    (programs / "git").write_text(
        '#!/bin/sh\ncase "$*" in *receive-pack*) drop="setpriv --bounding-set=-dac_override,-dac_read_search";; esac\n'
        f'[ "$(id -u)" = 0 ] || drop=\nexec $drop {shutil.which("git")} "$@"\n'
    )
    (programs / "git").chmod(0o755)
    repository.environ["PATH"] = f"{programs}:{repository.environ['PATH']}"
    mode = folder.stat().st_mode
    try:
        refused = await land(repository, tmp_path, {"a.txt": "a"}, before=lambda: folder.chmod(0o555))
    finally:
        folder.chmod(mode)
    assert isinstance(refused, DeferredLanding)
    assert message in refused.reason
    assert repository.git("status", "--porcelain") == ""
    assert not (repository.top / ".git/index.lock").exists()


async def test_daemon_of_a_hook_keeps_no_lock_of_a_killed_process(repository: Repository) -> None:
    """Otherwise the run could not resume before the daemon ends."""
    folder, trace = repository.top / ".git/hooks", repository.spawns.parent / "daemons"
    folder.mkdir(exist_ok=True)
    for name in ("update", "post-receive", "reference-transaction"):
        (folder / name).write_text(f'#!/bin/sh\nsleep 600 </dev/null >/dev/null 2>&1 &\necho $! >> "{trace}"\n')
        (folder / name).chmod(0o755)
    repository.remember()
    config = repository.configure([{"id": "t1", "prompt": "write a.txt a"}])
    try:
        killed = repository.council("run", str(config), failpoints="landing.pushed=kill")
        assert killed.code == -signal.SIGKILL, killed
        daemons = [int(pid) for pid in trace.read_text().split()]
        assert len(daemons) >= len(("update", "post-receive", "reference-transaction"))
        ended = repository.council("resume", "--json")
        assert ended.states == {"t1": "landed"}, ended
        assert all(Path(f"/proc/{pid}").exists() for pid in daemons)
    finally:
        for pid in trace.read_text().split():
            os.kill(int(pid), signal.SIGKILL)
    await repository.assert_invariants()


@pytest.mark.parametrize(
    ("key", "command"),
    [
        ("smudge", "./tools/x.sh"),
        ("clean", "python tools/x.py %f"),
        ("smudge", "sh x.sh"),
        ("process", '"$(git rev-parse --show-toplevel)"/tools/x.sh'),
        ("clean", "cat | tools/x.sh"),
        ("clean", "cat<(tools/x.sh)"),
        ("clean", "cat $( tools/x.sh )"),
        ("clean", "cat %f\ntools/x.sh"),
        ("clean", "cat %f;tools/x.sh"),
        ("clean", "cat ;tools/x.sh # it's"),
        ("clean", "sed s/a/b/ | sh tools/x"),
        ("clean", "sed -f s/a/b/g"),
        ("clean", "sed -e s/a/b/ -nf tools/x"),
        ("clean", "sed 'e tools/x.sh'"),
        ("clean", "sed s/a/b/e"),
        ("clean", "./sed s/a/b/"),
    ],
)
async def test_filter_with_a_landable_program_defers_landings(
    repository: Repository, tmp_path: Path, key: str, command: str
) -> None:
    """The landed program would run; a run with that target does not start."""
    repository.git("config", f"filter.x.{key}", command)
    landed = await land(repository, tmp_path, {".gitattributes": "*.txt filter=y\n", "tools/x.sh": "exit 0\n"})
    assert isinstance(landed, DeferredLanding)
    assert command[:6] in landed.reason
    site = await find_run_repository(str(repository.top), is_url=False, environ=repository.environ)
    assert site.repository is not None
    with pytest.raises(RefusedError, match="agents can change"):
        await check_checkout(site.repository, "main", repository.environ)


@pytest.mark.parametrize(
    ("command", "path"),
    [("sh fmt", "fmt"), ("sh <fmt", "fmt"), ("python3 -m fmt", "fmt.py"), ("make -s fmt", "Makefile")],
)
@pytest.mark.parametrize("is_there", [True, False])
async def test_filter_whose_program_has_a_plain_name_defers_landings(
    repository: Repository, tmp_path: Path, command: str, path: str, is_there: bool
) -> None:
    """The file is in the checkout, or the landing would create it."""
    if is_there:
        repository.commit({path: "exit 0\n"}, "a program")
    repository.git("config", "filter.x.clean", command)
    landed = await land(repository, tmp_path, {".gitattributes": "*.txt filter=y\n", path: "touch ran\n"})
    assert isinstance(landed, DeferredLanding)
    assert (command if is_there else path) in landed.reason


@pytest.mark.parametrize("command", ["sed s/a/b/", "sed -e s/a/b/g -e 's|/x|/y|'", "tr a/ b: | cut -d/ -f1"])
async def test_filter_with_slashes_in_other_arguments_runs(
    repository: Repository, tmp_path: Path, command: str
) -> None:
    """Arguments of such a program may be expressions."""
    repository.git("config", "filter.x.clean", command)
    landed = await land(repository, tmp_path, {".gitattributes": "*.txt filter=x\n"})
    assert isinstance(landed, Landed), landed


async def test_filter_outside_of_the_checkout_runs(repository: Repository, tmp_path: Path) -> None:
    """Such as that of git LFS, or one by its absolute path."""
    (tmp_path / "up").write_text("#!/bin/sh\ntr a-z A-Z\n")
    (tmp_path / "up").chmod(0o755)
    repository.git("config", "filter.lfs.process", "git-lfs filter-process -- %f")
    repository.git("config", "filter.x.smudge", f"{tmp_path}/up %f")
    landed = await land(repository, tmp_path, {".gitattributes": "*.up filter=x\n", "a.up": "text\n"})
    assert isinstance(landed, Landed), landed
    assert (repository.top / "a.up").read_text() == "TEXT\n"


async def test_file_monitor_in_the_checkout_is_not_run_by_a_landing(repository: Repository, tmp_path: Path) -> None:
    """`core.fsmonitor` is off for all git commands of a landing."""
    trace, script = tmp_path / "trace", '#!/bin/sh\necho ran >> "{}"\n'

    def watch() -> None:
        repository.git("config", "core.fsmonitor", str(repository.top / "monitor"))

    repository.commit({"monitor": "#!/bin/sh\n"})
    repository.commit({"monitor": script.format(trace)}, "it leaves a trace")
    landed = await land(repository, tmp_path, {"other.txt": "x\n"}, watch)
    assert isinstance(landed, Landed), landed
    assert not trace.exists()


def includes(repository: Repository, tmp_path: Path) -> None:
    repository.git("config", "include.path", "../gitconfig")


def dotfiles(repository: Repository, tmp_path: Path) -> None:
    (Path(repository.environ["HOME"]) / ".gitconfig").symlink_to(repository.top / "gitconfig")


def included_from_outside(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "more").write_text(f"[include]\n\tpath = {repository.top}/gitconfig\n")
    repository.git("config", f"includeIf.gitdir:{repository.top}/.path", str(tmp_path / "more"))


def included_on_a_branch(repository: Repository, tmp_path: Path) -> None:
    """By a condition that is false now, in a file that git does not read until then."""
    (tmp_path / "more").write_text(f"[include]\n\tpath = {repository.top}/gitconfig\n")
    repository.git("config", "includeIf.onbranch:feature.path", str(tmp_path / "more"))


def of_another_worktree(repository: Repository, tmp_path: Path) -> None:
    repository.git("worktree", "add", "--quiet", "-b", "other", str(tmp_path / "other"))
    repository.git("config", "extensions.worktreeConfig", "true")
    settings = repository.top / ".git/worktrees/other/config.worktree"
    settings.write_text(f"[include]\n\tpath = {repository.top}/gitconfig\n")


WAYS = [includes, dotfiles, included_from_outside, included_on_a_branch, of_another_worktree]


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("way", WAYS)
async def test_landing_does_not_change_git_configuration_files(
    repository: Repository, tmp_path: Path, way: Callable[[Repository, Path], None], is_there: bool
) -> None:
    """A filter in them would run, as the user, with the next git command."""
    repository.environ.pop("GIT_CONFIG_GLOBAL", None)
    if is_there:
        repository.commit({"gitconfig": "[alias]\n\tst = status\n"}, "mine")
    way(repository, tmp_path)
    ran = tmp_path / "ran"
    evil = {"gitconfig": f'[filter "x"]\n\tclean = touch {ran}; cat\n', ".gitattributes": "* filter=x\n"}
    found = await land(repository, tmp_path, {"harmless.txt": "x\n"})
    assert isinstance(found, Landed)
    ran.unlink(missing_ok=True)
    found = await land(repository, tmp_path / "again", evil, before=lambda: ran.unlink(missing_ok=True))
    assert isinstance(found, DeferredLanding)
    assert "it changes gitconfig, which controls the programs that your git runs" in found.reason
    assert not ran.exists()


@pytest.mark.parametrize(
    ("script", "lost"),
    [
        ("git mv src lib; ln -s docs src", "src/.env"),
        ("git mv src lib; echo x > src", "src/deep/.env"),
        ("rm .gitignore; echo x > build", "build/out"),
        ("rm .gitignore; mkdir data; echo x > data/x", "data"),
    ],
)
async def test_landing_deletes_no_ignored_files(repository: Repository, script: str, lost: str) -> None:
    """Neither in a folder replaced by a file, nor a file replaced by a folder."""
    repository.commit({".gitignore": ".env\nbuild\ndata\n", "docs/d": "d\n"}, "more")
    repository.remember()
    mine = repository.top / lost
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine\n")
    prompt = f"{script}; git add --all; git commit --quiet --message work"
    config = repository.configure([{"id": "t", "prompt": prompt}], adapters={"sh": SHELL_ADAPTER})
    ended = repository.council("run", str(config), "--json")
    assert ended.states == {"t": "queued"}, ended
    assert "untracked files would be overwritten" in ended.result["tasks"][0]["reason"]
    assert mine.read_text() == "mine\n"


@pytest.mark.parametrize(
    "setting",
    ["core.fsmonitor", "diff.x.textconv", "merge.x.driver", "core.sshCommand", "alias.st", "credential.helper"],
)
async def test_landing_changes_no_program_run_by_the_users_git(
    repository: Repository, tmp_path: Path, setting: str
) -> None:
    """It would run with the user's next command; other files of the checkout may be changed."""
    repository.commit({"tools/mine": "#!/bin/sh\nexit 1\n"}, "mine")
    assert isinstance(await land(repository, tmp_path, {"x.txt": "x\n"}), Landed)

    def configure() -> None:
        repository.git("config", setting, f"{'!' if setting.startswith('alias') else ''}{repository.top}/tools/mine")

    found = await land(repository, tmp_path / "again", {"tools/mine": "#!/bin/sh\ntouch ran\n"}, before=configure)
    assert isinstance(found, DeferredLanding)
    assert "it changes tools/mine, which controls the programs that your git runs" in found.reason


_EMBEDDED = (
    "mkdir -p {0}/objects {0}/refs && echo 'ref: refs/heads/x' >{0}/HEAD && echo x >{0}/objects/x && echo x >{0}/refs/x"
    " && printf '[core]\\n\\tfsmonitor = touch {1}\\n\\tworktree = .\\n' >{0}/config"
)


@pytest.mark.parametrize("parts", [1, 2])
async def test_landing_creates_no_repository(repository: Repository, tmp_path: Path, parts: int) -> None:
    """Nor do two landings that bring a part each; `salvage apply` rejects it too."""
    ran = tmp_path / "ran"
    whole = _EMBEDDED.format("docs/Notes", ran)
    scripts = [whole] if parts == 1 else [f"{whole}; rm docs/Notes/HEAD", f"{whole}; rm -r docs/Notes/[or]*"]
    tasks = [{"id": f"t{number}", "prompt": script} for number, script in enumerate(scripts)]
    ended = repository.council("run", str(repository.configure(tasks, adapters={"sh": SHELL_ADAPTER})), "--json")
    assert sorted(ended.states.values()) == ["landed"] * (parts - 1) + ["queued"], ended
    (waiting,) = (one for one in ended.result["tasks"] if one["status"] == "queued")
    assert "git would treat docs/Notes as a separate repository" in waiting["reason"]
    if parts == 1:
        assert repository.council("cancel", waiting["id"]).code in {0, 1}
        (kept,) = repository.council("salvage", "list", "--json").result["preserved"]
        applied = repository.council("salvage", "apply", kept["name"])
        assert (applied.code, "a separate repository" in applied.stderr) == (2, True), applied
    repository.git("status")
    assert not ran.exists()


async def test_salvage_apply_changes_nothing_that_git_runs(repository: Repository) -> None:
    """It rejects what a landing defers."""
    repository.commit({"gitconfig": "[alias]\n\tst = status\n"}, "mine")
    repository.git("config", "include.path", "../gitconfig")
    task = {
        "id": "t",
        "prompt": "echo '[core]' >>gitconfig; echo '\tpager = evil' >>gitconfig",
        "allow_failing_base": True,
        "checks": ["false"],
    }
    config = repository.configure([{**task, "attempts": 1}], adapters={"sh": SHELL_ADAPTER})
    assert repository.council("run", str(config)).code == 1
    (kept,) = repository.council("salvage", "list", "--json").result["preserved"]
    applied = repository.council("salvage", "apply", kept["name"])
    assert (applied.code, "it changes gitconfig, which controls" in applied.stderr) == (2, True), applied
    assert "evil" not in (repository.top / "gitconfig").read_text()
