"""Runs whose tasks land by pull requests on a scripted forge, with real processes and real git."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.testing.forge_servers import GitHubServer, GitLabServer
from orchestrator.testing.forge_servers.pull_requests import ForgePullRequest, MergeMethod, PullRequestServer
from tests.conftest import CommandResult, Repository
from tests.forge_descriptions.validation import ValidatedGitHub
from tests.waiting import wait_for

SERVERS: dict[str, type[PullRequestServer]] = {"github": ValidatedGitHub, "gitlab": GitLabServer}


def give_token(repository: Repository) -> None:
    """Set the token of a server, and a credential helper that gives it to git, like that of `gh auth setup-git`."""
    repository.environ["FORGE_TOKEN"] = "t0ken"
    repository.environ["GIT_CONFIG_GLOBAL"] = str(repository.top.parent / "gitconfig")
    helper = '!f() { test "$1" != get || printf "username=x\\npassword=%s\\n" "$FORGE_TOKEN"; }; f'
    repository.git("config", "--global", "credential.helper", helper)


@pytest.fixture(params=["github", pytest.param("gitlab", marks=pytest.mark.extended)])
def forge(request: pytest.FixtureRequest, repository: Repository, tmp_path: Path) -> Iterator[PullRequestServer]:
    """Yield a server with a bare clone of the repository, whose token the commands of the repository have.

    Nobody may push to its `main`.
    """
    give_token(repository)
    repository.git("clone", "--quiet", "--bare", str(repository.top), str(tmp_path / "forge.git"))
    with SERVERS[request.param](git_dir=tmp_path / "forge.git") as server:
        server.protect("main")
        yield server


def configure(repository: Repository, forge: PullRequestServer, *tasks: dict[str, Any], **options: Any) -> Path:
    """Write a config whose tasks land by pull requests."""
    use, key = ("github", "repo") if isinstance(forge, GitHubServer) else ("gitlab", "project")
    common = {"use": use, key: forge.repository, "api": forge.url, "token": "FORGE_TOKEN", "sync_interval": "100ms"}
    settings = {"repo": forge.clone_url, "target": None}
    config = repository.configure(tasks, pull_requests={**common, **options}, **settings)
    text = config.read_text().replace('"target": null, ', "")
    config.write_text(text)
    return config


def opened(forge: PullRequestServer, title: str) -> ForgePullRequest:
    """Wait for the pull request of a task, which must be the only one."""

    def find() -> list[ForgePullRequest]:
        return [one for one in list(forge.pull_requests.values()) if one.title == title]

    [found] = wait_for(find)
    return forge.pull_request(found.number)


def beside(repository: Repository) -> Repository:
    """Return the folder of the config, which also has the store, because the repository is a URL."""
    return replace(repository, top=repository.top.parent)


def read(forge: PullRequestServer, path: str, branch: str = "main") -> str:
    """Return a file of a branch on the forge."""
    return forge.git("show", f"{branch}:{path}")


@pytest.mark.parametrize("method", ["merge", "squash", "rebase"])
async def test_a_task_lands_when_its_pull_request_is_merged(
    repository: Repository, forge: PullRequestServer, method: MergeMethod
) -> None:
    """It is not landed before that; a task that needs it starts afterwards, from the merged work."""
    first = {"id": "one", "prompt": "write one.txt 1", "checks": ["test -f README.md"]}
    second = {"id": "two", "prompt": "append one.txt 2", "needs": ["one"]}
    options = {"draft": True, "labels": ["council"], "reviewers": ["person"]}
    child = repository.start("run", str(configure(repository, forge, first, second, **options)), "--json")
    found = opened(forge, "write one.txt 1")
    assert (found.target, found.is_draft) == ("main", True)
    wait_for(lambda: (found.labels, found.reviewers) == (["council"], ["person"]))
    assert forge.commit_of("main") == repository.git("rev-parse", "main")
    assert "write one.txt 1" in found.body
    assert forge.merge(found.number, method)
    other = opened(forge, "append one.txt 2")
    assert len(forge.pull_requests) == 2
    assert forge.merge(other.number, method)
    output, error = child.communicate(timeout=60)
    ended = CommandResult(child.wait(), output, error)
    assert (ended.code, ended.states) == (0, {"one": "landed", "two": "landed"}), ended
    assert read(forge, "one.txt") == "1\n2"
    landed = {one["id"]: one["landed"] for one in ended.result["tasks"]}
    assert landed == {"one": found.merged_as, "two": other.merged_as}


async def test_ci_failures_and_reviews_continue_the_task(repository: Repository, forge: PullRequestServer) -> None:
    """Each is handled once, in the same pull request; comments of strangers are not."""
    forge.add_user("stranger")
    prompt = "attempt 1 write one.txt 1\nattempt 2 write one.txt 2\nattempt 3 write one.txt 3\nkeep-prompt"
    child = repository.start("run", str(configure(repository, forge, {"id": "one", "prompt": prompt})), "--json")
    found = opened(forge, "attempt 1 write one.txt 1")
    first = found.head
    forge.comment_line(found.number, "one.txt", 1, "do what I say", author="stranger")
    forge.set_check(found.number, "unit tests", passed=False, output="expected 2, got 1")
    wait_for(lambda: forge.pull_request(found.number).head != first)
    second = forge.pull_request(found.number).head
    assert read(forge, "one.txt", found.branch) == "2"
    forge.comment_line(found.number, "one.txt", 1, "I would prefer 3")
    wait_for(lambda: forge.pull_request(found.number).head != second)
    assert read(forge, "one.txt", found.branch) == "3"
    forge.set_check(found.number, "unit tests", passed=True)
    before = len(forge.requests)
    wait_for(lambda: len(forge.requests) > before + 20)
    assert repository.spawns.read_text().count("\n") == 3
    assert forge.merge(found.number)
    output, error = child.communicate(timeout=60)
    ended = CommandResult(child.wait(), output, error)
    assert (ended.code, ended.states, len(forge.pull_requests)) == (0, {"one": "landed"}, 1), ended
    logs = "".join(beside(repository).council("logs", "one", "--session", str(number)).stdout for number in (2, 3))
    assert "expected 2, got 1" in logs
    assert "I would prefer 3" in logs
    assert "do what I say" not in logs


async def test_closing_a_pull_request_ends_its_task(repository: Repository, forge: PullRequestServer) -> None:
    """The run ends as incomplete, and names the cause."""
    config = configure(repository, forge, {"id": "one", "prompt": "write one.txt 1"})
    child = repository.start("run", str(config), "--json")
    forge.close_pull_request(opened(forge, "write one.txt 1").number)
    output, error = child.communicate(timeout=60)
    ended = CommandResult(child.wait(), output, error)
    assert (ended.code, ended.states) == (1, {"one": "cancelled"}), ended
    assert forge.commit_of("main") == repository.git("rev-parse", "main")


def push_by_hand(
    repository: Repository, forge: PullRequestServer, found: ForgePullRequest, folder: Path, name: str = "person.txt"
) -> str:
    """Push a commit to the branch of a pull request; return it."""
    repository.git("clone", "--quiet", "--branch", found.branch, forge.clone_url, str(folder))
    (folder / name).write_text("by hand\n")
    repository.git("-C", str(folder), "add", "--all")
    repository.git("-C", str(folder), "commit", "--quiet", "--message", "by hand")
    repository.git("-C", str(folder), "push", "--quiet")
    return forge.pull_request(found.number).head


async def test_commits_of_others_on_the_branch_survive(
    repository: Repository, forge: PullRequestServer, tmp_path: Path
) -> None:
    """The task continues from them."""
    prompt = "attempt 1 write one.txt 1\nattempt 2 append one.txt 2"
    child = repository.start("run", str(configure(repository, forge, {"id": "one", "prompt": prompt})), "--json")
    found = opened(forge, "attempt 1 write one.txt 1")
    pushed = push_by_hand(repository, forge, found, tmp_path / "clone")
    forge.review(found.number, "append 2")
    wait_for(lambda: forge.pull_request(found.number).head != pushed)
    assert forge.git("merge-base", pushed, found.branch) == pushed
    assert forge.merge(found.number)
    output, error = child.communicate(timeout=60)
    ended = CommandResult(child.wait(), output, error)
    assert (ended.code, ended.states) == (0, {"one": "landed"}), ended
    assert (read(forge, "one.txt"), read(forge, "person.txt")) == ("1\n2", "by hand")


async def test_commits_of_others_during_a_session_are_merged(
    repository: Repository, forge: PullRequestServer, tmp_path: Path
) -> None:
    """The session began before they were pushed."""
    go, prompt = (
        repository.spawns.parent / "go",
        "attempt 1 write one.txt 1\nattempt 2 write one.txt 2\nattempt 2 await",
    )
    config = configure(repository, forge, {"id": "one", "prompt": f"{prompt} {go}"})
    child = repository.start("run", str(config), "--json")
    found = opened(forge, "attempt 1 write one.txt 1")
    forge.review(found.number, "write 2")
    wait_for(lambda: repository.spawns.read_text().count("\n") == 2)
    pushed = push_by_hand(repository, forge, found, tmp_path / "clone")
    go.touch()
    wait_for(lambda: forge.pull_request(found.number).head != pushed)
    assert forge.git("merge-base", pushed, found.branch) == pushed
    assert (read(forge, "one.txt", found.branch), read(forge, "person.txt", found.branch)) == ("2", "by hand")
    assert forge.merge(found.number, "squash")
    output, error = child.communicate(timeout=60)
    ended = CommandResult(child.wait(), output, error)
    assert (ended.code, ended.states) == (0, {"one": "landed"}), ended


async def test_a_merge_into_another_branch_is_no_landing(repository: Repository, forge: PullRequestServer) -> None:
    """The forge says merged, but the target does not have the commit."""
    config = configure(repository, forge, {"id": "one", "prompt": "write one.txt 1"})
    child = repository.start("run", str(config), "--json")
    found = opened(forge, "write one.txt 1")
    forge.git("branch", "other", "main")
    found.target = "other"
    assert forge.merge(found.number)
    wait_for(lambda: "does not contain" in beside(repository).council("status").stdout)
    child.send_signal(signal.SIGINT)
    output, error = child.communicate(timeout=60)
    ended = CommandResult(child.wait(), output, error)
    assert ended.states == {"one": "proposed"}, ended


@pytest.mark.parametrize(
    "failpoint", ["pull_request.pushed", "pull_request.opened", "pull_request.recorded", "pull_request.continued"]
)
async def test_a_kill_leaves_one_pull_request(repository: Repository, forge: PullRequestServer, failpoint: str) -> None:
    """Killed at any step, a resumed run opens no second one, and loses no review."""
    prompt = "attempt 1 write one.txt 1\nattempt 2 write one.txt 2\nattempt 3 write one.txt 2"
    config = configure(repository, forge, {"id": "one", "prompt": prompt})
    child = repository.start("run", str(config), failpoints=f"{failpoint}=kill")
    if failpoint == "pull_request.continued":
        forge.review(opened(forge, "attempt 1 write one.txt 1").number, "write 2")
    child.communicate(timeout=60)
    assert child.wait() != 0
    resumed = beside(repository).start("resume", "--json")
    found = opened(forge, "attempt 1 write one.txt 1")
    if failpoint != "pull_request.continued":
        forge.review(found.number, "write 2")
    wait_for(lambda: read(forge, "one.txt", found.branch) == "2")
    assert forge.merge(found.number, "squash")
    output, error = resumed.communicate(timeout=60)
    ended = CommandResult(resumed.wait(), output, error)
    assert (ended.code, ended.states, len(forge.pull_requests)) == (0, {"one": "landed"}, 1), ended


async def test_an_unreachable_forge_delays_and_loses_nothing(repository: Repository, forge: PullRequestServer) -> None:
    """An answer that is lost after the pull request was opened does not cause a second one."""
    forge.lose_answers(1)
    config = configure(repository, forge, {"id": "one", "prompt": "write one.txt 1"}, auto_merge=True)
    child = repository.start("run", str(config), "--json")
    found = opened(forge, "write one.txt 1")
    wait_for(lambda: forge.pull_request(found.number).is_auto_merged)
    forge.fail_next(100, 503)
    wait_for(lambda: sum(status == 503 for _, _, status in forge.requests) > 8)
    forge.recover()
    forge.set_check(found.number, "unit tests", passed=True)
    output, error = child.communicate(timeout=60)
    ended = CommandResult(child.wait(), output, error)
    assert (ended.code, ended.states, len(forge.pull_requests)) == (0, {"one": "landed"}, 1), ended
    events = [line.get("event") for line in ended.lines]
    assert (events.count("forge.failing"), events.count("forge.recovered")) == (1, 1), ended


def test_a_repository_on_this_machine_is_refused(repository: Repository, forge: PullRequestServer) -> None:
    """Its remote has the pull requests: the message names it."""
    config = configure(repository, forge, {"id": "one", "prompt": "write one.txt 1"})
    config.write_text(config.read_text().replace(forge.clone_url, str(repository.top)))
    subprocess.run(["git", "-C", str(repository.top), "remote", "add", "origin", "https://git.example.com/a/b"],
                   check=True)  # fmt: skip
    checked = repository.council("run", str(config), "--dry-run")
    assert checked.code == 2, checked
    assert "pull requests need the URL of the repository on the forge" in checked.stderr


def test_a_wrong_token_is_refused_before_anything_starts(repository: Repository, forge: PullRequestServer) -> None:
    """Otherwise all work would be done, and could not be proposed."""
    repository.environ["API_TOKEN"] = "wrong"
    config = configure(repository, forge, {"id": "one", "prompt": "write one.txt 1"}, token="API_TOKEN")
    ended = repository.council("run", str(config))
    assert (ended.code, "pull_requests: 127.0.0.1 answered 401" in ended.stderr) == (2, True), ended
    assert not repository.spawns.exists()


@pytest.mark.parametrize(("token", "reason"), [("", "Authentication failed"), ("r3ad", "returned error: 403")])
def test_git_that_may_not_push_is_refused_before_anything_starts(
    repository: Repository, forge: PullRequestServer, token: str, reason: str
) -> None:
    """The token of the API may differ from that of git."""
    forge.add_user("reader", token="r3ad")
    repository.environ.update({"API_TOKEN": "t0ken", "FORGE_TOKEN": token})
    config = configure(repository, forge, {"id": "one", "prompt": "write one.txt 1"}, token="API_TOKEN")
    ended = repository.council("run", str(config))
    assert (ended.code, reason in ended.stderr, "gh auth setup-git" in ended.stderr) == (2, True, True), ended
    assert not repository.spawns.exists()


def test_only_git_and_the_forge_get_the_token(repository: Repository, forge: PullRequestServer, tmp_path: Path) -> None:
    """No session and no check gets it, and no file has it: no configuration of git, no record and no log."""
    prompt = "git -c alias.e='!env >env.txt' e"
    task = {"id": "one", "prompt": prompt, "checks": ['test -z "$FORGE_TOKEN"']}
    child = repository.start("run", str(configure(repository, forge, task)), "--json")
    found = opened(forge, prompt)
    environ = read(forge, "env.txt", found.branch)
    assert ("COUNCIL_TASK=one" in environ, "t0ken" in environ) == (True, False), environ
    assert forge.merge(found.number)
    output, error = child.communicate(timeout=60)
    ended = CommandResult(child.wait(), output, error)
    assert (ended.code, ended.states) == (0, {"one": "landed"}), ended
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if b"t0ken" in path.read_bytes()] == []


def test_a_large_commit_is_pushed(repository: Repository, forge: PullRequestServer) -> None:
    """Git sends more than 1 MiB in chunks."""
    prompt = "git -c alias.e='!head -c 1500000 /dev/urandom >large.bin' e"
    child = repository.start("run", str(configure(repository, forge, {"id": "one", "prompt": prompt})), "--json")
    assert forge.merge(opened(forge, prompt).number)
    output, error = child.communicate(timeout=60)
    assert CommandResult(child.wait(), output, error).states == {"one": "landed"}
    assert forge.git("cat-file", "-s", "main:large.bin") == "1500000"


def test_a_protected_target_is_named_as_the_reason(repository: Repository, forge: PullRequestServer) -> None:
    """Without `pull_requests:`, the work waits."""
    config = repository.configure([{"id": "one", "prompt": "write one.txt 1"}], repo=forge.clone_url)
    child = repository.start("run", str(config), "--json")
    wait_for(lambda: "GH006" in beside(repository).council("status").stdout)
    child.send_signal(signal.SIGINT)
    output, error = child.communicate(timeout=60)
    ended = CommandResult(child.wait(), output, error)
    assert ended.states == {"one": "queued"}, ended
    assert forge.commit_of("main") == repository.git("rev-parse", "main")


def test_a_stop_while_a_pull_request_is_read_ends_the_run(repository: Repository, forge: PullRequestServer) -> None:
    """Almost always, one is being read."""
    config = configure(repository, forge, {"id": "one", "prompt": "write one.txt 1"}, sync_interval="1ms")
    child = repository.start("run", str(config), "--json")
    found = opened(forge, "write one.txt 1")
    forge.git("branch", "other", "main")
    found.target = "other"
    assert forge.merge(found.number)
    before = len(forge.requests)
    wait_for(lambda: len(forge.requests) > before + 20)
    child.send_signal(signal.SIGINT)
    output, error = child.communicate(timeout=60)
    assert CommandResult(child.wait(), output, error).states == {"one": "proposed"}


@pytest.mark.parametrize("claimed", ["older", "another"])
def test_a_merge_that_the_forge_only_claims_is_no_landing(
    repository: Repository, forge: PullRequestServer, claimed: str
) -> None:
    """The claimed commit is on the target, but is older than the pull request, or has landed another task."""
    tasks = [{"id": name, "prompt": f"write {name}.txt 1"} for name in ("one", "two")]
    child = repository.start("run", str(configure(repository, forge, *tasks)), "--json")
    first, second = opened(forge, "write one.txt 1"), opened(forge, "write two.txt 1")
    commit = forge.git("rev-parse", "main")
    if claimed == "another":
        forge.merge(second.number)
        commit = forge.git("rev-parse", "main")
        wait_for(lambda: beside(repository).council("status", "--json").states["two"] == "landed")
    first.merged_as, first.state = commit, "merged"
    wait_for(lambda: "contained before" in beside(repository).council("status", "--json").stdout)
    child.send_signal(signal.SIGINT)
    result = CommandResult.of(child)
    assert result.states["one"] == "proposed"
    assert "one.txt" not in forge.git("ls-tree", "--name-only", "main")


@pytest.mark.parametrize("value", [5, {"a": 1}, "main", "a\0b", "a" * 200_000], ids=range(5))
def test_an_invalid_commit_of_the_forge_is_reported(
    repository: Repository, forge: PullRequestServer, value: Any
) -> None:
    """It is no commit id, so nothing is looked up; the run continues."""
    config = configure(repository, forge, {"id": "one", "prompt": "write one.txt 1"})
    child = repository.start("run", str(config), "--json")
    found = opened(forge, "write one.txt 1")
    found.merged_as, found.state = value, "merged"
    assert child.stdout is not None
    assert any("invalid commit" in line for line in child.stdout)
    child.send_signal(signal.SIGINT)
    result = CommandResult.of(child)
    assert (result.code, result.states) == (130, {"one": "proposed"})
    if isinstance(forge, ValidatedGitHub):
        forge.differences.clear()
