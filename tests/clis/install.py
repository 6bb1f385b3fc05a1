"""Install real CLIs under `.clis` of this repository: `python -m tests.clis.install [CLI…]`.

The default is `CLIS`, or all. Each is installed in a folder of its own, in the newest verified version, or with
`LATEST` in the newest one; one with that version is kept. `installed.json` has the version of each, or the reason why
it cannot be installed here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from packaging.version import Version

from orchestrator.engine.diagnostics.programs import make_default_adapters
from orchestrator.plugins import load_plugins
from tests.clis.programs import CLIS, selected


@dataclass(frozen=True, slots=True)
class Package:
    """A package of npm, or of PyPI for these versions of Python, and the packages that it needs in addition."""

    name: str
    pythons: Sequence[str] = ()
    more: Sequence[str] = ()


#: By program.
PACKAGES: Final = {
    "aider": Package("aider-chat", ("3.11", "3.12", "3.10")),
    "claude": Package("@anthropic-ai/claude-code"),
    "cline": Package("cline"),
    "cn": Package("@continuedev/cli"),
    "codex": Package("@openai/codex"),
    "copilot": Package("@github/copilot"),
    "crush": Package("@charmland/crush"),
    "gemini": Package("@google/gemini-cli"),
    "kilo": Package("@kilocode/cli"),
    "kimi": Package("kimi-cli", ("3.13", "3.12")),
    "llm": Package("llm", ("3.11", "3.12", "3.13", "3.14")),
    "mini": Package("mini-swe-agent", ("3.11", "3.12", "3.13"), ("mcp",)),
    "opencode": Package("opencode-ai"),
    "qwen": Package("@qwen-code/qwen-code"),
    "vibe": Package("mistral-vibe", ("3.12", "3.13")),
}
_RECORD: Final = CLIS / "installed.json"
_OLDEST_NODE: Final = 20


class NotInstalledError(Exception):
    """A CLI cannot be installed; the message has the fix."""


def installed() -> Mapping[str, Mapping[str, str]]:
    """Return by program its `wanted` and installed `version`, or the `error`."""
    return dict(json.loads(_RECORD.read_text())) if _RECORD.exists() else {}


def install(program: str, wanted: str) -> str:
    """Install a program in a version, "" for the newest; return the version. Raises NotInstalledError."""
    package, folder = PACKAGES[program], CLIS / program
    shutil.rmtree(folder, ignore_errors=True)
    if package.pythons:
        version, file = _install_from_pypi(package, wanted, folder), folder / "bin" / program
    else:
        version, file = _install_from_npm(package, wanted, folder), folder / "node_modules/.bin" / program
    (CLIS / "bin").mkdir(exist_ok=True)
    (CLIS / "bin" / program).unlink(missing_ok=True)
    (CLIS / "bin" / program).symlink_to(file)
    return version


def _install_from_npm(package: Package, wanted: str, folder: Path) -> str:
    _check_node()
    # The newest by name: a range would depend on the version of node.
    _run("npm", "install", "--no-audit", "--no-fund", "--loglevel=error", f"--prefix={folder}",
         f"{package.name}@{wanted or 'latest'}", *package.more)  # fmt: skip
    return str(json.loads((folder / "node_modules" / package.name / "package.json").read_text())["version"])


def _install_from_pypi(package: Package, wanted: str, folder: Path) -> str:
    found = next((name for name in (f"python{version}" for version in package.pythons) if _runs(name)), None)
    if found is None:
        raise NotInstalledError(f"{package.name} needs Python {' or '.join(package.pythons)}, none of which runs")
    _run(found, "-m", "venv", str(folder))
    python = str(folder / "bin/python")
    requirement = f"{package.name}=={wanted}" if wanted else package.name
    _run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement, *package.more)
    asked = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    return subprocess.run(
        [python, "-c", asked, package.name], capture_output=True, text=True, check=True
    ).stdout.strip()


def _runs(python: str) -> bool:
    """Return whether it is on PATH and starts: a version manager has launchers of versions that are not enabled."""
    if shutil.which(python) is None:
        return False
    return subprocess.run([python, "-c", ""], check=False, stderr=subprocess.DEVNULL).returncode == 0


def _check_node() -> None:
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            raise NotInstalledError(
                f"{program} is missing: install Node.js {_OLDEST_NODE} or newer with npm, or select other programs, "
                'for example CLIS="aider ollama"'
            )
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.removeprefix("v").partition(".")[0]) < _OLDEST_NODE:
        raise NotInstalledError(f"node is {version}: install {_OLDEST_NODE} or newer")


def _run(*argv: str) -> None:
    done = subprocess.run(argv, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise NotInstalledError(f"`{' '.join(argv)}` ended with {done.returncode}")


def verified_versions() -> dict[str, Sequence[str]]:
    """Return the versions that each program was verified with, oldest first."""
    adapters, _ = make_default_adapters(load_plugins({"COUNCIL_PLUGINS": ""}).adapters)
    programs = [program for adapter in adapters.values() for program in adapter.programs()]
    return {program.name: sorted(program.verified or (), key=Version) for program in programs}


def main(*names: str) -> None:
    """Install the named CLIs. One that cannot be installed fails only a choice of CLIs."""
    text = " ".join(names) or os.environ.get("CLIS", "")
    is_latest, verified = bool(os.environ.get("LATEST")), verified_versions()
    CLIS.mkdir(exist_ok=True)
    for program in sorted({one.needs for one in selected(text).values() if one.needs is not None}):
        wanted = "" if is_latest else next(iter(reversed(verified.get(program, ()))), "")
        known = installed().get(program, {})
        if "error" not in known and known.get("wanted") == wanted != "" and (CLIS / "bin" / program).exists():
            continue
        try:
            found = {"wanted": wanted, "version": install(program, wanted)}
        except NotInstalledError as error:
            found = {"error": str(error)}
            sys.stderr.write(f"not installed: {error}\n")
            if text and not is_latest:
                sys.exit(1)
        _RECORD.write_text(json.dumps({**installed(), program: found}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
