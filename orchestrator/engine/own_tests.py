"""The command that runs a repository's own tests, told from the files at its top. Pure but for `read_top`."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_LARGEST: Final = 1 << 20
"""Bytes of a file that is looked into."""

Top = Mapping[str, str]
"""The names at the top of a repository, those of folders ending with a slash, with the contents that were read."""


@dataclass(frozen=True, slots=True)
class OwnTests:
    """A shell command that runs the tests, the file that tells it, and what a fresh checkout may need before."""

    command: str
    told_by: str
    before: str | None = None


def find_own_tests(top: Top) -> OwnTests | None:
    """Return how the tests of a repository are run; None if nothing tells.

    What its authors wrote down as their command comes before what is usual for a language.
    """
    return next(filter(None, (rule(top) for rule in _RULES)), None)


def read_top(folder: Path) -> dict[str, str]:
    """Return what is at the top of a repository, with the contents of the files that tell of tests; blocks."""
    top: dict[str, str] = {}
    for entry in sorted(folder.iterdir()):
        with suppress(OSError):
            top[f"{entry.name}/" if entry.is_dir() else entry.name] = _read(entry) if entry.name in _READ else ""
    return top


def _read(file: Path) -> str:
    if not file.is_file() or file.stat().st_size > _LARGEST:
        return ""
    with file.open("rb") as opened:
        return opened.read(_LARGEST).decode("utf-8-sig", errors="replace")


def _json(text: str) -> dict[str, Any]:
    """Return a JSON object; an empty one where there is none."""
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    return {}


def _toml(text: str) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        return tomllib.loads(text)
    return {}


def _within(value: Any, *keys: str) -> Any:
    """Return what is at a path of keys, None where it does not lead anywhere."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _package_json(top: Top) -> OwnTests | None:
    package = _json(top.get("package.json", ""))
    script = _within(package, "scripts", "test")
    # What `npm init` writes.
    if not isinstance(script, str) or not script.strip() or "no test specified" in script:
        return None
    manager = package.get("packageManager")
    named = manager.partition("@")[0] if isinstance(manager, str) else ""
    locked = next((name for lock, name in _LOCKS.items() if lock in top), "npm")
    command, before = _MANAGERS.get(named) or _MANAGERS[locked]
    if command == "npm test" and "package-lock.json" not in top:
        before = "npm install"
    return OwnTests(command, "package.json", before)


_LOCKS: Final = {
    "pnpm-lock.yaml": "pnpm",
    "yarn.lock": "yarn",
    "bun.lock": "bun",
    "bun.lockb": "bun",
    "package-lock.json": "npm",
}
_MANAGERS: Final = {
    "npm": ("npm test", "npm ci"),
    "pnpm": ("pnpm test", "pnpm install --frozen-lockfile"),
    "yarn": ("yarn test", "yarn install --immutable"),
    "bun": ("bun run test", "bun install --frozen-lockfile"),  # `bun test` is another thing than the script
}


def _composer(top: Top) -> OwnTests | None:
    if _within(_json(top.get("composer.json", "")), "scripts", "test"):
        return OwnTests("composer test", "composer.json", "composer install")
    config = next((one for one in ("phpunit.xml", "phpunit.xml.dist") if one in top), None)
    if "composer.json" in top and config is not None:
        return OwnTests("vendor/bin/phpunit", config, "composer install")
    return None


def _deno(top: Top) -> OwnTests | None:
    name = next((one for one in ("deno.json", "deno.jsonc") if one in top), None)
    if name is None:
        return None
    task = re.search(r'"tasks"\s*:\s*\{[^{}]*"test"\s*:', top[name])
    return OwnTests("deno task test" if task else "deno test", name)


def _makefile(top: Top) -> OwnTests | None:
    name = next((one for one in ("GNUmakefile", "makefile", "Makefile") if one in top), None)
    # A rule, and no assignment (`test := …`).
    if name is None or not re.search(r"^test[ \t]*::?(?![:=])", top[name], re.MULTILINE):
        return None
    return OwnTests("make test", name)


def _python(top: Top) -> OwnTests | None:
    project = _toml(top.get("pyproject.toml", ""))
    tells = next((name for name, found in _pytest_signs(top, project).items() if found), None)
    if tells is not None:
        runner = next((words for lock, words in _PYTHON_LOCKS.items() if lock in top), "python3 -m")
        return OwnTests(f"{runner} pytest", tells)
    if "noxfile.py" in top:
        return OwnTests("nox", "noxfile.py")
    if "tox.ini" in top or "tox.toml" in top or _within(project, "tool", "tox") is not None:
        return OwnTests("tox", next((one for one in ("tox.ini", "tox.toml") if one in top), "pyproject.toml"))
    if "manage.py" in top:
        return OwnTests("python3 manage.py test", "manage.py")
    return None


_PYTHON_LOCKS: Final = {"uv.lock": "uv run", "poetry.lock": "poetry run", "pdm.lock": "pdm run"}


def _pytest_signs(top: Top, project: Mapping[str, Any]) -> dict[str, bool]:
    """Return the files that may tell that pytest is used, and whether they do."""
    named = [project.get("dependency-groups"), _within(project, "project", "optional-dependencies")]
    named += [_within(project, "project", "dependencies"), _within(project, "tool", "poetry")]
    named += [_within(project, "tool", "uv"), _within(project, "tool", "pdm")]
    return {
        "pytest.ini": "pytest.ini" in top,
        "pyproject.toml": _within(project, "tool", "pytest") is not None or "pytest" in repr(named),
        "setup.cfg": "[tool:pytest]" in top.get("setup.cfg", ""),
        "conftest.py": "conftest.py" in top,
        "requirements.txt": bool(re.search(r"^pytest\b", top.get("requirements.txt", ""), re.MULTILINE)),
    }


def _gradle(top: Top) -> OwnTests | None:
    name = next((one for one in ("build.gradle.kts", "build.gradle", "settings.gradle.kts", "settings.gradle")
                 if one in top), None)  # fmt: skip
    if name is None:
        return None
    return OwnTests("./gradlew test" if "gradlew" in top else "gradle test", name)


def _maven(top: Top) -> OwnTests | None:
    if "pom.xml" not in top:
        return None
    return OwnTests("./mvnw --batch-mode test" if "mvnw" in top else "mvn --batch-mode test", "pom.xml")


def _ruby(top: Top) -> OwnTests | None:
    if "Gemfile" not in top:
        return None
    if ".rspec" in top or "spec/" in top or re.search(r"""['"]rspec""", top["Gemfile"]):
        return OwnTests("bundle exec rspec", "Gemfile", "bundle install")
    return OwnTests("bundle exec rake test", "Rakefile", "bundle install") if "Rakefile" in top else None


def _usual(name: str, command: str, before: str | None = None) -> Callable[[Top], OwnTests | None]:
    """Return the rule of a language that has one way to run tests."""
    return lambda top: OwnTests(command, name, before) if name in top else None


_RULES: Final[tuple[Callable[[Top], OwnTests | None], ...]] = (
    _package_json,
    _composer,
    _makefile,
    _python,
    _usual("Cargo.toml", "cargo test"),
    _usual("go.mod", "go test ./..."),
    _maven,
    _gradle,
    _usual("mix.exs", "mix test", "mix deps.get"),
    _ruby,
    _deno,
    _usual("Package.swift", "swift test"),
)

#: The files whose contents are looked into; of the others it is enough that they are there.
_READ: Final = frozenset(
    {
        *("package.json", "composer.json", "deno.json", "deno.jsonc", "GNUmakefile", "makefile", "Makefile"),
        *("pyproject.toml", "setup.cfg", "requirements.txt", "Gemfile"),
    }
)
