"""Machines share a store and a remote, and nothing else: each has its own home and folder."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from tests.command_server import StartedCommand
from tests.conftest import Repository

QUICK = {
    "heartbeat_interval": "300ms",
    "stale_after": "1500ms",
    "owner_stale_after": "1500ms",
    "stale_check_interval": "300ms",
}


@dataclass(frozen=True)
class Cluster:
    """A remote, and a store on a server."""

    repository: Repository
    remote: Path
    store: str
    machines: list[Repository] = field(default_factory=list)

    def machine(self, name: str) -> Repository:
        """Return a machine with a home and an empty folder of its own."""
        place = self.repository.top.parent / name
        (place / "home").mkdir(parents=True)
        (place / "work").mkdir()
        environ = {"HOME": str(place / "home"), "COUNCIL_HOME": str(place / "council-home")}
        made = replace(self.repository, top=place / "work", environ={**self.repository.environ, **environ})
        self.machines.append(made)
        return made

    def configure(self, machine: Repository, *tasks: Mapping[str, Any], **settings: Any) -> str:
        """Write a file for runs that this machine creates, and return its path."""
        settings = {"coordination": QUICK, **settings}
        path = replace(self.repository, top=machine.top / "project").configure(
            tasks, repo=f"file://{self.remote}", state={"url": self.store}, **settings
        )
        return str(path)

    def git(self, *arguments: str) -> str:
        """Return the output of git in the remote."""
        return self.repository.git("--git-dir", str(self.remote), *arguments)

    def shared(self) -> list[str]:
        """Return the refs of shared work."""
        return self.git("for-each-ref", "--format=%(refname)", "refs/council/").split()

    def attempts(self) -> list[str]:
        """Return the starts of sessions on all machines, as `task attempt`."""
        lines = self.repository.spawns.read_text().splitlines() if self.repository.spawns.exists() else []
        return [line.partition(" ")[2] for line in lines]


@contextmanager
def open_cluster(repository: Repository, store: str) -> Iterator[Cluster]:
    """Yield a cluster whose remote has the repository; end all processes of its machines, perhaps after a failure."""
    remote = repository.top.parent / "remote.git"
    repository.git("clone", "--quiet", "--bare", str(repository.top), str(remote))
    cluster = Cluster(repository, remote, store)
    try:
        yield cluster
    finally:
        for machine in cluster.machines:
            signal_machine(machine, signal.SIGKILL)


def work(machine: Repository, cluster: Cluster, *more: str, failpoints: str = "") -> StartedCommand:
    """Start a worker of the newest run, with nothing but the URL of the store."""
    return machine.start("work", "latest", "--state", cluster.store, "--json", *more, failpoints=failpoints)


def signal_machine(machine: Repository, number: signal.Signals) -> None:
    """Send a signal to all processes of a machine, including its sessions."""
    home = machine.environ["COUNCIL_HOME"]
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if process.environ().get("COUNCIL_HOME") == home or _works_in(process, home):
                os.kill(process.pid, number)


def _works_in(process: psutil.Process, home: str) -> bool:
    return process.cwd().startswith(home)
