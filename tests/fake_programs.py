"""Fake CLIs on a PATH of the test's own, and a plugin with adapters for them."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import Repository
from tests.distributions import install

_PLUGIN = """
import pluggy
from pydantic import BaseModel
from orchestrator.protocols import SessionCommand, Program, AgentMessage

hookimpl = pluggy.HookimplMarker("cli_council")


def adapter(name, **facts):
    class Adapter:
        class Options(BaseModel):
            model_config = {"extra": "forbid"}
            model: str = "best"

        def __init__(self, options, /):
            pass

        def capabilities(self):
            return frozenset()

        def programs(self):
            return (Program(name, **facts),)

        def command(self, request):
            return SessionCommand(argv=[name, request.prompt], pass_env=["ALPHA_KEY", "BETA_LOGIN"])

        def parse(self, line):
            return (AgentMessage(line),) if line.strip() else ()

        def verdict(self, end):
            return None

    return Adapter


class Needy(adapter("needy")):
    class Options(BaseModel):
        endpoint: str


@hookimpl
def council_register_adapters(register):
    register("alpha-code", adapter("alpha", install="install alpha", version=("--version",), supported=">=2,<3"))
    register("beta-code", adapter("beta", install="install beta", version=("version",), supported=">=1",
                                  ready=("status",), keys=("ALPHA_KEY",), log_in="run `beta login`"))
    register("needy", Needy)
"""


@dataclass(frozen=True)
class FakePrograms:
    """The PATH of all processes of a test, with these programs and the requirements of `council` only."""

    folder: Path

    def add(self, name: str, script: str) -> Path:
        """Put a shell script on PATH."""
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def remove(self, name: str) -> None:
        """Remove a program from PATH."""
        (self.folder / name).unlink()


def install_fake_programs(tmp_path: Path, repository: Repository) -> FakePrograms:
    """Replace the PATH of a repository's commands, and install a plugin with `alpha-code` and `beta-code`."""
    fakes = FakePrograms(tmp_path / "fakes")
    fakes.folder.mkdir()
    for name in ("git", "sh", "rm", "bwrap"):
        found = shutil.which(name)
        if found is not None:
            (fakes.folder / name).symlink_to(found)
    repository.environ["PATH"] = str(fakes.folder)
    install_plugin(tmp_path, repository, "fake_programs_plugin", _PLUGIN)
    return fakes


def install_plugin(tmp_path: Path, repository: Repository, name: str, source: str) -> None:
    """Install a distribution with one plugin, version 1.0, for the repository's commands."""
    place = tmp_path / "plugins"
    install(place, name, source)
    repository.environ["PYTHONPATH"] = os.fspath(place)
