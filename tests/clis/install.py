"""Install real CLIs under `.clis` of this repository: `python -m tests.clis.install [PROGRAM…]`.

The default is `CLIS`, or all. Installed ones of the requested version are kept.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import Final

from tests.clis.programs import CLIS, selected

#: By CLI: the npm package, installed in its newest version, or the pip requirement.
NPM: Final = {
    "claude": "@anthropic-ai/claude-code",
    "codex": "@openai/codex",
    "gemini": "@google/gemini-cli",
    "opencode": "opencode-ai",
}
PYPI: Final = {"aider": "aider-chat==0.86.*"}
_RECORD: Final = CLIS / "installed.json"
_OLDEST_NODE: Final = 20


class NotInstalledError(Exception):
    """A CLI cannot be installed; the message has the fix."""


def install(programs: set[str]) -> None:
    """Install missing CLIs by name. Raises NotInstalledError."""
    for_npm = {name: _newest(package) for name, package in NPM.items() if name in programs}
    for_pip = {name: what for name, what in PYPI.items() if name in programs}
    missing = _missing(for_npm)
    if missing:
        _check_node(missing)
        # npm removes packages missing from its package.json: one call for all new ones.
        _run("npm", "install", "--no-audit", "--no-fund", "--loglevel=error", f"--prefix={CLIS}", *missing.values())
        _keep(missing)
    for name, what in _missing(for_pip).items():
        _run(sys.executable, "-m", "venv", str(CLIS / name))
        _run(str(CLIS / name / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", what)
        (CLIS / "bin").mkdir(exist_ok=True)
        (CLIS / "bin" / name).unlink(missing_ok=True)
        (CLIS / "bin" / name).symlink_to(CLIS / name / "bin" / name)
        _keep({name: what})


def _newest(package: str) -> str:
    """Return a package at npm's latest version; a range would depend on the version of node."""
    if shutil.which("npm") is None:
        return f"{package}@latest"
    asked = subprocess.run(["npm", "view", package, "version"], capture_output=True, text=True, check=False)
    return f"{package}@{asked.stdout.strip() or 'latest'}"


def _missing(wanted: dict[str, str]) -> dict[str, str]:
    known = _kept()
    places = (CLIS / "bin", CLIS / "node_modules/.bin")
    return {
        name: what
        for name, what in wanted.items()
        if known.get(name) != what or not any((place / name).exists() for place in places)
    }


def _kept() -> dict[str, str]:
    return dict(json.loads(_RECORD.read_text())) if _RECORD.exists() else {}


def _keep(installed: dict[str, str]) -> None:
    _RECORD.write_text(json.dumps(_kept() | installed, indent=1) + "\n")


def _check_node(wanted: dict[str, str]) -> None:
    names = ", ".join(sorted(wanted))
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            raise NotInstalledError(
                f"{program} is missing, without which there is no {names}: install Node.js {_OLDEST_NODE} "
                'or newer with npm, or select other programs, for example CLIS="aider ollama"'
            )
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.removeprefix("v").partition(".")[0]) < _OLDEST_NODE:
        raise NotInstalledError(f"node is {version}: install {_OLDEST_NODE} or newer for {names}")


def _run(*argv: str) -> None:
    done = subprocess.run(argv, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise NotInstalledError(f"`{' '.join(argv)}` ended with {done.returncode}")


def main(*names: str) -> None:
    """Install the requirements of the named CLIs."""
    chosen = selected(" ".join(names) or os.environ.get("CLIS", ""))
    CLIS.mkdir(exist_ok=True)
    try:
        install({one.needs for one in chosen.values() if one.needs is not None})
    except NotInstalledError as error:
        sys.exit(f"not installed: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
