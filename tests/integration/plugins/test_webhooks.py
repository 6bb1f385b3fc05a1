"""Webhooks of forges wake active runs, and need a signature."""

from __future__ import annotations

import hashlib
import hmac
import json
import signal
from pathlib import Path

import httpx
import pytest

from orchestrator.forges.webhooks import is_signed
from orchestrator.testing.forge_servers import GitHubServer
from tests.conftest import CommandResult, Repository
from tests.integration.plugins.test_boards import shown, trackers
from tests.waiting import wait_for

SECRET = "s3cret-of-the-webhook"


def signature(body: bytes, secret: str = SECRET) -> dict[str, str]:
    """Return the headers of GitHub."""
    return {"X-Hub-Signature-256": "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (signature(b"{}"), True),
        (signature(b"{}", "other"), False),
        (signature(b"{ }"), False),
        ({"X-Gitlab-Token": SECRET}, True),
        ({"X-Gitlab-Token": "other"}, False),
        ({"X-Gitlab-Token": SECRET, "X-Hub-Signature-256": "sha256=0"}, False),
        ({}, False),
    ],
)
def test_signatures(headers: dict[str, str], expected: bool) -> None:
    """Of another body, with another secret, or none."""
    assert is_signed({name.lower(): value for name, value in headers.items()}, b"{}", SECRET) == expected


async def test_a_webhook_wakes_an_active_run(repository: Repository, tmp_path: Path) -> None:
    """A run that reads its board once an hour sees a comment at once; an unsigned request changes nothing."""
    repository.environ.update(FORGE_TOKEN="t0ken", COUNCIL_WEBHOOK_SECRET=SECRET)
    with GitHubServer() as forge:
        forge.add_issue("Hang", "hang", ["work"])
        board = trackers(forge)
        board["board"]["sync_interval"] = "1h"
        child = repository.start("run", str(repository.configure([], trackers=board)), "--json")
        wait_for(lambda: "council: running" in shown(forge, 1))
        receiver = repository.start("serve-webhooks", "--port", "0", "--json")
        assert receiver.stdout is not None
        url = f"http://127.0.0.1:{json.loads(receiver.stdout.readline())['port']}/github"
        forge.comment(1, "/council cancel")
        async with httpx.AsyncClient() as client:
            statuses = [
                (await client.post(url, content=b"{}")).status_code,
                (await client.post(url, content=b"{}", headers=signature(b"{}", "other"))).status_code,
                (await client.get(url)).status_code,
            ]
            assert statuses == [401, 401, 405]
            assert "forge.changed" not in repository.council("state", "log", "--json").stdout
            for _ in range(3):  # as forges do: a repetition does no harm
                assert (await client.post(url, content=b"{}", headers=signature(b"{}"))).status_code == 204
        output, error = child.communicate(timeout=60)
        ended = CommandResult(child.wait(), output, error)
        assert ended.states == {"issue-1": "cancelled"}, ended
        assert len([line for line in ended.lines if line.get("event") == "tracker.requested"]) == 1
        receiver.send_signal(signal.SIGINT)
        receiver.communicate(timeout=60)


def test_a_secret_is_required(repository: Repository) -> None:
    """Otherwise anyone could send webhooks."""
    assert repository.council("run", str(repository.configure([{"id": "one", "prompt": "write one.txt 1"}]))).code == 0
    ended = repository.council("serve-webhooks", "--port", "0")
    assert (ended.code, "COUNCIL_WEBHOOK_SECRET is not set" in ended.stderr) == (2, True), ended
