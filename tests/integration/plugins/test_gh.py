"""Runs with the real `gh`: it lists the same issues, and gives the token to git and to the connection."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.testing.forge_servers import GitHubServer
from tests.conftest import CommandResult, Repository
from tests.integration.plugins.test_boards import trackers
from tests.integration.plugins.test_pull_requests import configure, opened, read

pytestmark = pytest.mark.skipif(
    shutil.which("gh") is None or shutil.which("openssl") is None, reason="gh or openssl is not installed"
)


@pytest.fixture
def forge(repository: Repository, tmp_path: Path) -> Iterator[GitHubServer]:
    """Yield a GitHub Enterprise server, to which `gh` is logged in, and which only `gh` gives git access to."""
    certificate = tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", certificate, "-out", tmp_path / "public.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    public = tmp_path / "public.pem"
    certificate.write_text(certificate.read_text() + public.read_text())
    repository.git("clone", "--quiet", "--bare", str(repository.top), str(tmp_path / "forge.git"))
    with GitHubServer(git_dir=tmp_path / "forge.git", certificate=certificate) as server:
        repository.environ.update({
            "GH_HOST": server.origin.removeprefix("https://"), "GH_ENTERPRISE_TOKEN": "t0ken",
            "GH_CONFIG_DIR": str(tmp_path / "gh"), "GH_NO_UPDATE_NOTIFIER": "1",
            "SSL_CERT_FILE": str(public), "GIT_SSL_CAINFO": str(public),
            "GIT_CONFIG_GLOBAL": str(tmp_path / "gitconfig"),
        })  # fmt: skip
        yield server


def gh(repository: Repository, *arguments: str) -> str:
    """Return the output of `gh`."""
    done = subprocess.run(["gh", *arguments], env=repository.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    return done.stdout


@pytest.mark.parametrize("labels", [[], ["work"]])
def test_gh_lists_the_issues_of_the_tracker(repository: Repository, forge: GitHubServer, labels: list[str]) -> None:
    """With and without a label, for which `gh` searches."""
    for title, own in (("Write one", ["work"]), ("Write two", ["work", "other"]), ("Write three", []), ("Old", [])):
        forge.add_issue(title, labels=own)
    forge.close(4)
    config = repository.configure([], trackers=trackers(forge, labels=labels))
    planned = repository.council("run", str(config), "--dry-run", "--json")
    tasks = [one["id"] for wave in planned.result["waves"] for one in wave["tasks"]]
    flags = [word for label in labels for word in ("--label", label)]
    listed = json.loads(gh(repository, "issue", "list", "--json", "number", *flags, "--repo", "acme/shop"))
    assert sorted(f"issue-{one['number']}" for one in listed) == sorted(tasks)
    assert len(listed) == (2 if labels else 3)


def test_gh_gives_the_token_to_git_and_the_run(repository: Repository, forge: GitHubServer) -> None:
    """As documented: after `gh auth setup-git`, no variable has the token for `council`."""
    gh(repository, "auth", "setup-git")
    config = configure(repository, forge, {"id": "one", "prompt": "write one.txt 1"}, token="GITHUB_TOKEN")
    child = repository.start("run", str(config), "--json")
    assert forge.merge(opened(forge, "write one.txt 1").number, "squash")
    output, error = child.communicate(timeout=60)
    ended = CommandResult(child.wait(), output, error)
    assert (ended.code, ended.states, read(forge, "one.txt")) == (0, {"one": "landed"}, "1"), ended
