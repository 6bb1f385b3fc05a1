"""Real projects for the long tests: source archives from the package index as repositories."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

from tests.conftest import Repository


def download(requirement: str, folder: Path) -> Path:
    """Download the source archive of a requirement."""
    command = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(folder), requirement]
    subprocess.run([sys.executable, "-m", "pip", *command], check=True)
    return next(folder.glob("*.tar.gz"))


def unpack(archive: Path, repository: Repository) -> None:
    """Commit the files of an archive to a repository."""
    with tarfile.open(archive) as opened:
        opened.extractall(repository.top.parent, filter="data")
        name = opened.getnames()[0].split("/")[0]
    for path in sorted((repository.top.parent / name).iterdir()):
        target = repository.top / path.name
        if not target.exists() or target.is_file():
            path.rename(target)
        else:
            subprocess.run(["cp", "-r", f"{path}/.", str(target)], check=True)
    repository.git("add", "--all", "--force")  # all files of an archive belong to it, despite its .gitignore
    repository.commit({}, "the project")
    repository.remember()
