"""Detect a repository's test command and its requirements from top-level files.

Pure except for `read_top_level`.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_MAX_FILE_SIZE: Final = 1 << 20
"""The largest size in bytes of a file that is parsed."""

_REQUIREMENTS: Final = re.compile(r"(?:[a-z]+-)?requirements(?:[-_][a-z]+)?\.txt")

TopLevelFiles = Mapping[str, str]
"""The names in the root of a repository (those of folders end with a slash), with the contents that were read.

Python test files are included, even those in a folder of tests and in its subfolders.
"""

_TEST_FOLDERS: Final = ("tests/", "test/")
_PYTHON_TEST: Final = re.compile(r"test[^/]*\.py")
_IMPORTS_UNITTEST: Final = re.compile(r"^\s*(?:import|from) unittest\b", re.MULTILINE)
#: An import of pytest, or tests that `unittest` does not run: functions, and classes without a base.
_IS_FOR_PYTEST: Final = re.compile(
    r"^\s*(?:import|from) pytest\b|^(?:async )?def test|^class Test\w*(?:\(\))?:", re.MULTILINE
)
_MAX_TEST_FILES: Final = 50
"""The largest number of test files that are read in a folder."""


@dataclass(frozen=True, slots=True)
class ProjectEnvironment:
    """The shell command that creates a checkout's environment, and its input files.

    `programs` is a folder of programs that it creates.
    """

    setup: str
    inputs: tuple[str, ...]
    programs: str | None = None
    needs: tuple[str, ...] = ()
    """Shell commands that succeed if the machine can create the environment."""


@dataclass(frozen=True, slots=True)
class RepositoryTests:
    """The test command, the file that declares it, and the environment that it needs."""

    command: str
    declared_in: str
    before: str | None = None
    """A command that may need to run first."""
    environment: ProjectEnvironment | None = None
    needs: tuple[str, ...] = ()
    """Shell commands that succeed if the machine can run the tests."""
    fallback: RepositoryTests | None = None
    """An alternative for machines that don't meet these needs."""
    missing: tuple[str, ...] = ()
    """Its programs that are not visible in the sandbox on this machine."""

    @property
    def alternatives(self) -> list[RepositoryTests]:
        """Return this command and its fallbacks, best first."""
        return [self, *([] if self.fallback is None else self.fallback.alternatives)]


def detect_tests(top: TopLevelFiles) -> RepositoryTests | None:
    """Return the test command of a repository; None if its files indicate none.

    A command that the authors declared takes precedence over the convention of a language.
    """
    return next(filter(None, (rule(top) for rule in _RULES)), None)


def read_top_level(folder: Path) -> dict[str, str]:
    """Return top-level names of a repository, with the contents of files to parse.

    Blocks.
    """
    top: dict[str, str] = {}
    for entry in sorted(folder.iterdir()):
        with suppress(OSError):
            name = f"{entry.name}/" if entry.is_dir() else entry.name
            is_parsed = name in _PARSED_FILES or _REQUIREMENTS.fullmatch(name) or _PYTHON_TEST.fullmatch(name)
            top[name] = _read(entry) if is_parsed else ""
    for folder_name in _TEST_FOLDERS:
        if folder_name in top:
            for pattern in ("test*.py", "*/test*.py"):
                with suppress(OSError):
                    files = sorted((folder / folder_name).glob(pattern))[:_MAX_TEST_FILES]
                    top |= {file.relative_to(folder).as_posix(): _read(file) for file in files}
    return top


def _read(file: Path) -> str:
    if not file.is_file() or file.stat().st_size > _MAX_FILE_SIZE:
        return ""
    with file.open("rb") as opened:
        return opened.read(_MAX_FILE_SIZE).decode("utf-8-sig", errors="replace")


def _json(text: str) -> dict[str, Any]:
    """Parse a JSON object; return an empty one for any other text."""
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
    """Return the value at a path of keys; None if there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _package_json(top: TopLevelFiles) -> RepositoryTests | None:
    package = _json(top.get("package.json", ""))
    script = _within(package, "scripts", "test")
    # The placeholder of `npm init`.
    if not isinstance(script, str) or not script.strip() or "no test specified" in script:
        return None
    return RepositoryTests(_TEST_COMMANDS[_manager(top, package)], "package.json", environment=_node_environment(top))


def _manager(top: TopLevelFiles, package: Mapping[str, Any]) -> str:
    """Return the package manager of a Node project."""
    manager = package.get("packageManager")
    named = manager.partition("@")[0] if isinstance(manager, str) else ""
    locked = next((name for lock, name in _LOCKS.items() if lock in top), "npm")
    return named if named in _TEST_COMMANDS else locked


def _node_environment(top: TopLevelFiles) -> ProjectEnvironment | None:
    """Return the environment of a Node project; None if it needs no packages."""
    package = _json(top.get("package.json", ""))
    manager = _manager(top, package)
    locks = tuple(lock for lock, name in _LOCKS.items() if name == manager and lock in top)
    depends = any(package.get(key) for key in ("dependencies", "devDependencies", "optionalDependencies"))
    if not locks and not depends:
        return None
    commands = {
        "npm": "npm ci" if locks else "npm install --no-package-lock",
        "pnpm": "pnpm install --frozen-lockfile" if locks else "pnpm install --no-lockfile",
        # The lock files of yarn 2 and later contain this key.
        "yarn": f"yarn install {'--immutable' if '__metadata:' in top.get('yarn.lock', '') else '--frozen-lockfile'}",
        "bun": "bun install --frozen-lockfile" if locks else "bun install --no-save",
    }
    return ProjectEnvironment(commands[manager], ("package.json", *locks))


_LOCKS: Final = {
    "pnpm-lock.yaml": "pnpm",
    "yarn.lock": "yarn",
    "bun.lock": "bun",
    "bun.lockb": "bun",
    "package-lock.json": "npm",
    "npm-shrinkwrap.json": "npm",
}
_TEST_COMMANDS: Final = {
    "npm": "npm test",
    "pnpm": "pnpm test",
    "yarn": "yarn test",
    "bun": "bun run test",  # `bun test` does not run the script
}


def _composer(top: TopLevelFiles) -> RepositoryTests | None:
    if _within(_json(top.get("composer.json", "")), "scripts", "test"):
        return RepositoryTests("composer test", "composer.json", "composer install")
    config = next((one for one in ("phpunit.xml", "phpunit.xml.dist") if one in top), None)
    if "composer.json" in top and config is not None:
        return RepositoryTests("vendor/bin/phpunit", config, "composer install")
    return None


def _deno(top: TopLevelFiles) -> RepositoryTests | None:
    name = next((one for one in ("deno.json", "deno.jsonc") if one in top), None)
    if name is None:
        return None
    task = re.search(r'"tasks"\s*:\s*\{[^{}]*"test"\s*:', top[name])
    return RepositoryTests("deno task test" if task else "deno test", name)


def _makefile(top: TopLevelFiles) -> RepositoryTests | None:
    name = next((one for one in ("GNUmakefile", "makefile", "Makefile") if one in top), None)
    # A rule, not an assignment (`test := …`).
    if name is None or not re.search(r"^test[ \t]*::?(?![:=])", top[name], re.MULTILINE):
        return None
    plain = RepositoryTests("make test", name)
    environment = next(iter(_python_environments(top)), None) or _node_environment(top)
    if environment is None:
        return plain
    folder = environment.programs
    command = "make test" if folder is None else f'PATH="$PWD/{folder}:$PATH" make test'
    return RepositoryTests(command, name, environment=environment, fallback=plain)


def _python(top: TopLevelFiles) -> RepositoryTests | None:
    project = _toml(top.get("pyproject.toml", ""))
    declared_by = next((name for name, found in _pytest_signs(top, project).items() if found), None)
    if declared_by is not None:
        return _pytest(top, declared_by)
    if "noxfile.py" in top:
        return RepositoryTests("nox", "noxfile.py")
    if "tox.ini" in top or "tox.toml" in top or _within(project, "tool", "tox") is not None:
        return RepositoryTests("tox", next((one for one in ("tox.ini", "tox.toml") if one in top), "pyproject.toml"))
    if "manage.py" in top:
        environment = next(iter(_python_environments(top)), None)
        python = "python3" if environment is None else f"{_VENV}/python"
        return RepositoryTests(f"{python} manage.py test", "manage.py", environment=environment)
    return None


def _python_test_files(top: TopLevelFiles) -> RepositoryTests | None:
    """Return the command for Python tests that no other file declares.

    They are in the root or in a folder.
    """
    tests = {name: text for name, text in top.items() if _PYTHON_TEST.fullmatch(name.rpartition("/")[2])}
    for_pytest = next((name for name, text in tests.items() if _IS_FOR_PYTEST.search(text)), None)
    return _unittest(top) if for_pytest is None else _pytest(top, for_pytest)


def _unittest(top: TopLevelFiles) -> RepositoryTests | None:
    """Return the command that discovers `unittest` tests in the root or a folder."""
    for folder in ("", *_TEST_FOLDERS):
        tests = {name: text for name, text in top.items() if re.fullmatch(rf"{folder}test[^/]*\.py", name)}
        declared_in = next((name for name, text in tests.items() if _IMPORTS_UNITTEST.search(text)), None)
        if declared_in is not None:
            environment = next(iter(_python_environments(top)), None)
            python = "python3" if environment is None else f"{_VENV}/python"
            start = f" -s {folder.rstrip('/')}" if folder else ""
            return RepositoryTests(f"{python} -m unittest discover{start}", declared_in, environment=environment)
    return None


def _pytest(top: TopLevelFiles, declared_by: str) -> RepositoryTests | None:
    """Return the best command for pytest, with its fallbacks."""
    found: RepositoryTests | None = None
    for environment in reversed(_python_environments(top, "pytest")):
        found = RepositoryTests(f"{_VENV}/python -m pytest", declared_by, environment=environment, fallback=found)
    if _python_environments(top):
        return found
    return RepositoryTests("python3 -m pytest", declared_by, needs=('python3 -c "import pytest"',), fallback=found)


_VENV: Final = ".venv/bin"
#: How the tool of each lock file creates `.venv` in the project.
_PYTHON_LOCKS: Final = {
    "uv.lock": "uv sync --frozen --all-extras",
    "poetry.lock": "POETRY_VIRTUALENVS_IN_PROJECT=true poetry install --no-interaction --all-extras",
    "pdm.lock": "pdm install --frozen-lockfile",
}
_MAKES_VENV: Final = 'python3 -c "import ensurepip, venv"'
#: A virtual environment sees only the packages of the installation that it was created from.
_IS_INSTALLATION: Final = 'python3 -c "import sys, {module}; sys.exit(sys.prefix != sys.base_prefix)"'


def _python_environments(top: TopLevelFiles, module: str | None = None) -> list[ProjectEnvironment]:
    """Return virtual environments for a project and a module, best first.

    Without a module, empty for a project that needs no packages.
    """
    for lock, setup in _PYTHON_LOCKS.items():
        if lock in top:
            return [ProjectEnvironment(setup, ("pyproject.toml", lock) if "pyproject.toml" in top else (lock,), _VENV)]
    words, inputs = _pip_words(top)
    if module is None or _is_declared(top, module):
        return [_venv(words, inputs)] if words else []
    installed = _IS_INSTALLATION.format(module=module)
    shared = [_venv(words, inputs, "--system-site-packages ", installed)] if words else []
    return [*shared, _venv([*words, module], inputs)]


def _venv(words: list[str], inputs: list[str], options: str = "", *needs: str) -> ProjectEnvironment:
    setup = f"python3 -m venv {options}.venv && {_VENV}/pip install -q {' '.join(words)}"
    return ProjectEnvironment(setup, tuple(inputs), _VENV, (_MAKES_VENV, *needs))


def _pip_words(top: TopLevelFiles) -> tuple[list[str], list[str]]:
    """Return a project's `pip install` arguments, and the files that they come from."""
    files = [name for name in top if _REQUIREMENTS.fullmatch(name)]
    words = [word for name in files for word in ("-r", name)]
    project = _toml(top.get("pyproject.toml", ""))
    is_package = "setup.py" in top or "build-system" in project or "project" in project
    if is_package:
        extras = _within(project, "project", "optional-dependencies")
        wanted = [name for name, listed in (extras or {}).items() if "pytest" in repr(listed)]
        words += ["-e", f"'.[{','.join(wanted)}]'" if wanted else "."]
        files += [name for name in ("pyproject.toml", "setup.cfg", "setup.py") if name in top]
    groups = project.get("dependency-groups")
    for listed in groups.values() if isinstance(groups, dict) else ():
        if "pytest" in repr(listed) and isinstance(listed, list):
            words += [shlex.quote(one) for one in listed if isinstance(one, str)]
    return words, files


def _is_declared(top: TopLevelFiles, module: str) -> bool:
    """Return True if a project's declared packages include a module of this name."""
    words, files = _pip_words(top)
    texts = [" ".join(words), *(top[name] for name in files if name.endswith(".txt"))]
    project = _toml(top.get("pyproject.toml", ""))
    texts += [repr(_within(project, "project", "dependencies"))]
    texts += [repr(_within(project, "project", "optional-dependencies"))]
    return any(re.search(rf"\b{module}\b", text) for text in texts)


def _pytest_signs(top: TopLevelFiles, project: Mapping[str, Any]) -> dict[str, bool]:
    """Return whether pytest is used, according to each file that may indicate it."""
    named = [project.get("dependency-groups"), _within(project, "project", "optional-dependencies")]
    named += [_within(project, "project", "dependencies"), _within(project, "tool", "poetry")]
    named += [_within(project, "tool", "uv"), _within(project, "tool", "pdm")]
    return {
        "pytest.ini": "pytest.ini" in top,
        "pyproject.toml": _within(project, "tool", "pytest") is not None or "pytest" in repr(named),
        "setup.cfg": "[tool:pytest]" in top.get("setup.cfg", ""),
        "conftest.py": "conftest.py" in top,
        **{
            name: bool(re.search(r"^pytest\b", text, re.MULTILINE))
            for name, text in top.items()
            if _REQUIREMENTS.fullmatch(name)
        },
    }


def _ruby(top: TopLevelFiles) -> RepositoryTests | None:
    if "Gemfile" not in top:
        return None
    if ".rspec" in top or "spec/" in top or re.search(r"""['"]rspec""", top["Gemfile"]):
        return RepositoryTests("bundle exec rspec", "Gemfile", "bundle install")
    return RepositoryTests("bundle exec rake test", "Rakefile", "bundle install") if "Rakefile" in top else None


def _file_rule(
    names: tuple[str, ...], command: str, before: str | None = None, wrapper: str | None = None
) -> Callable[[TopLevelFiles], RepositoryTests | None]:
    """Return a language's rule: the first existing file determines the test command.

    `wrapper` is a file that replaces the program of the command.
    """

    def rule(top: TopLevelFiles) -> RepositoryTests | None:
        name = next((name for name in names if name in top), None)
        if name is None:
            return None
        _, _, arguments = command.partition(" ")
        return RepositoryTests(f"./{wrapper} {arguments}" if wrapper in top else command, name, before)

    return rule


_RULES: Final[tuple[Callable[[TopLevelFiles], RepositoryTests | None], ...]] = (
    _package_json,
    _composer,
    _makefile,
    _python,
    _file_rule(("Cargo.toml",), "cargo test"),
    _file_rule(("go.mod",), "go test ./..."),
    _file_rule(("pom.xml",), "mvn --batch-mode test", wrapper="mvnw"),
    _file_rule(
        ("build.gradle.kts", "build.gradle", "settings.gradle.kts", "settings.gradle"), "gradle test", wrapper="gradlew"
    ),
    _file_rule(("mix.exs",), "mix test", "mix deps.get"),
    _ruby,
    _deno,
    _file_rule(("Package.swift",), "swift test"),
    _python_test_files,
)

#: The files whose contents are parsed; for other files only their existence matters.
_PARSED_FILES: Final = frozenset(
    {
        *("package.json", "composer.json", "deno.json", "deno.jsonc", "GNUmakefile", "makefile", "Makefile"),
        *("pyproject.toml", "setup.cfg", "Gemfile", "yarn.lock"),
    }
)
