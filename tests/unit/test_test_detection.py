"""Detection of a repository's test command from its top-level files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from orchestrator.engine.diagnostics.test_detection import detect_tests, read_top_level

SCRIPT = json.dumps({"scripts": {"test": "jest"}})
DEPENDS = json.dumps({"scripts": {"test": "jest"}, "devDependencies": {"jest": "29"}})
VENV_PYTEST = ".venv/bin/python -m pytest"
PIP = "python3 -m venv .venv && .venv/bin/pip install -q"
SHARED_PIP = "python3 -m venv --system-site-packages .venv && .venv/bin/pip install -q"
PYTEST = "[tool.pytest.ini_options]\n"

TREES: list[tuple[dict[str, str], str | None, str | None]] = [
    ({}, None, None),
    ({"README.md": "run npm test"}, None, None),
    ({"package.json": SCRIPT}, "npm test", None),
    ({"package.json": DEPENDS}, "npm test", "npm install --no-package-lock"),
    ({"package.json": SCRIPT, "package-lock.json": "{}"}, "npm test", "npm ci"),
    ({"package.json": SCRIPT, "pnpm-lock.yaml": ""}, "pnpm test", "pnpm install --frozen-lockfile"),
    ({"package.json": SCRIPT, "yarn.lock": ""}, "yarn test", "yarn install --frozen-lockfile"),
    ({"package.json": SCRIPT, "yarn.lock": "__metadata:\n"}, "yarn test", "yarn install --immutable"),
    ({"package.json": SCRIPT, "bun.lock": ""}, "bun run test", "bun install --frozen-lockfile"),
    ({"package.json": SCRIPT, "bun.lockb": ""}, "bun run test", "bun install --frozen-lockfile"),
    (
        {"package.json": json.dumps({"scripts": {"test": "x"}, "packageManager": "pnpm@9.1.0"}), "yarn.lock": ""},
        "pnpm test",
        None,
    ),
    ({"package.json": '{"scripts": {"test": "echo \\"Error: no test specified\\" && exit 1"}}'}, None, None),
    ({"package.json": '{"scripts": {"build": "tsc"}}'}, None, None),
    ({"package.json": "{not json"}, None, None),
    ({"package.json": '{"scripts": ["test"]}'}, None, None),
    ({"package.json": '{"a":' * 100_000}, None, None),
    ({"pyproject.toml": PYTEST}, "python3 -m pytest", None),
    ({"pyproject.toml": PYTEST, "uv.lock": ""}, VENV_PYTEST, "uv sync --frozen --all-extras"),
    (
        {"pyproject.toml": PYTEST, "poetry.lock": ""},
        VENV_PYTEST,
        "POETRY_VIRTUALENVS_IN_PROJECT=true poetry install --no-interaction --all-extras",
    ),
    ({"pyproject.toml": PYTEST, "pdm.lock": ""}, VENV_PYTEST, "pdm install --frozen-lockfile"),
    ({"pyproject.toml": '[dependency-groups]\ntest = ["pytest>=8"]\n'}, VENV_PYTEST, f"{PIP} 'pytest>=8'"),
    ({"pyproject.toml": '[project.optional-dependencies]\ndev = ["pytest"]\n'}, VENV_PYTEST, f"{PIP} -e '.[dev]'"),
    ({"pyproject.toml": f'[project]\ndependencies = ["pytest"]\n{PYTEST}'}, VENV_PYTEST, f"{PIP} -e ."),
    ({"pyproject.toml": f"[project]\nname = 'x'\n{PYTEST}"}, VENV_PYTEST, f"{SHARED_PIP} -e ."),
    ({"setup.py": "", "conftest.py": ""}, VENV_PYTEST, f"{SHARED_PIP} -e ."),
    (
        {"requirements.txt": "requests\n", "requirements-dev.txt": "pytest\n"},
        VENV_PYTEST,
        f"{PIP} -r requirements-dev.txt -r requirements.txt",
    ),
    (
        {"manage.py": "", "requirements.txt": "django\n"},
        ".venv/bin/python manage.py test",
        f"{PIP} -r requirements.txt",
    ),
    (
        {"Makefile": "test:\n\tpytest\n", "requirements.txt": "pytest\n"},
        'PATH="$PWD/.venv/bin:$PATH" make test',
        f"{PIP} -r requirements.txt",
    ),
    (
        {"Makefile": "test:\n", "package.json": '{"devDependencies": {"x": "1"}}', "package-lock.json": ""},
        "make test",
        "npm ci",
    ),
    ({"pyproject.toml": "[tool.tox]\n"}, "tox", None),
    ({"pyproject.toml": "[project]\nname = 'x'\n"}, None, None),
    ({"pyproject.toml": "[broken"}, None, None),
    ({"setup.cfg": "[tool:pytest]\n"}, "python3 -m pytest", None),
    ({"pytest.ini": "", "tox.ini": ""}, "python3 -m pytest", None),
    ({"requirements.txt": "requests\npytest==8\n"}, VENV_PYTEST, f"{PIP} -r requirements.txt"),
    ({"conftest.py": ""}, "python3 -m pytest", None),
    ({"noxfile.py": "", "tox.ini": ""}, "nox", None),
    ({"tox.ini": ""}, "tox", None),
    ({"manage.py": ""}, "python3 manage.py test", None),
    ({"Makefile": "all: test\n\ntest: build\n\tpytest\n"}, "make test", None),
    ({"Makefile": "test ::\n\tpytest\n"}, "make test", None),
    ({"Makefile": "test := 1\ntests:\n\tx\n.PHONY: test\n"}, None, None),
    ({"Makefile": "test:\n", "pyproject.toml": PYTEST, "Cargo.toml": ""}, "make test", None),
    ({"Cargo.toml": ""}, "cargo test", None),
    ({"go.mod": ""}, "go test ./...", None),
    ({"pom.xml": ""}, "mvn --batch-mode test", None),
    ({"pom.xml": "", "mvnw": ""}, "./mvnw --batch-mode test", None),
    ({"build.gradle": ""}, "gradle test", None),
    ({"build.gradle.kts": "", "gradlew": ""}, "./gradlew test", None),
    ({"mix.exs": ""}, "mix test", "mix deps.get"),
    ({"composer.json": '{"scripts": {"test": "phpunit"}}'}, "composer test", "composer install"),
    ({"composer.json": "{}", "phpunit.xml.dist": ""}, "vendor/bin/phpunit", "composer install"),
    ({"composer.json": "{}"}, None, None),
    ({"Gemfile": "gem 'rspec'"}, "bundle exec rspec", "bundle install"),
    ({"Gemfile": "", "spec/": ""}, "bundle exec rspec", "bundle install"),
    ({"Gemfile": "", "Rakefile": ""}, "bundle exec rake test", "bundle install"),
    ({"Gemfile": ""}, None, None),
    ({"deno.json": '{"tasks": {"test": "deno test -A"}}'}, "deno task test", None),
    ({"deno.jsonc": "{\n // nothing\n}"}, "deno test", None),
    ({"Package.swift": ""}, "swift test", None),
    ({"tests/": "", "tests/test_a.py": "import unittest\n"}, "python3 -m unittest discover -s tests", None),
    ({"test_a.py": "from unittest import TestCase\n"}, "python3 -m unittest discover", None),
    (
        {"requirements.txt": "requests\n", "test/": "", "test/test_a.py": "import unittest\n"},
        ".venv/bin/python -m unittest discover -s test",
        f"{PIP} -r requirements.txt",
    ),
    ({"tests/": "", "tests/test_a.py": "def test_a():\n    pass\n"}, "python3 -m pytest", None),
    ({"tests/": "", "tests/test_a.py": "import pytest\nclass TestA: ...\n"}, "python3 -m pytest", None),
    (
        {"tests/": "", "tests/unit/": "", "tests/unit/test_a.py": "from pytest import raises\n"},
        "python3 -m pytest",
        None,
    ),
    ({"test_a.py": "import unittest\nimport pytest\n"}, "python3 -m pytest", None),
    ({"test_a.py": "async def test_a(): ...\n"}, "python3 -m pytest", None),
    (
        {"test_a.py": "import unittest\nclass A(unittest.TestCase):\n    def test_a(self): ...\n"},
        "python3 -m unittest discover",
        None,
    ),
    ({"tests/": "", "tests/test_a.py": "class TestA:\n    def test_a(self): ...\n"}, "python3 -m pytest", None),
    ({"tests/": "", "tests/test_data.py": "A = 1\n"}, None, None),
    (
        {"pyproject.toml": "[project]\nname = 'x'\n", "tests/": "", "tests/test_a.py": "import pytest\n"},
        VENV_PYTEST,
        f"{SHARED_PIP} -e .",
    ),
    (
        {"requirements.txt": "requests\n", "test_a.py": "import pytest\n"},
        VENV_PYTEST,
        f"{SHARED_PIP} -r requirements.txt",
    ),
    ({"test_a.py": "import pytest\n", "Cargo.toml": ""}, "cargo test", None),
    ({"tests/": "", "tests/helper.py": "import unittest\n"}, None, None),
    ({"tests/": "", "tests/test_a.py": "import unittest\n", "pytest.ini": ""}, "python3 -m pytest", None),
    ({"tests/": "", "tests/test_a.py": "import unittest\n", "Cargo.toml": ""}, "cargo test", None),
    ({"go.mod/": ""}, None, None),
    ({"packages/": "", "packages/package.json": SCRIPT}, None, None),
]


@pytest.mark.parametrize(("files", "command", "before"), TREES, ids=lambda one: None)
def test_command_follows_from_the_files(
    files: dict[str, str], command: str | None, before: str | None, tmp_path: Path
) -> None:
    """One row per supported way, with similar ones that do not count."""
    for name, content in files.items():
        path = tmp_path / name
        if name.endswith("/"):
            path.mkdir()
        else:
            path.write_text(content)
    found = detect_tests(read_top_level(tmp_path))
    assert (None if found is None else found.command) == command
    if found is not None:
        assert (found.before if found.environment is None else found.environment.setup) == before
        assert all(
            (tmp_path / name).exists() for name in (() if found.environment is None else found.environment.inputs)
        )
        assert (tmp_path / found.declared_in).exists()


def test_missing_program_gets_an_alternative(tmp_path: Path) -> None:
    """Without pytest a virtual environment gets one; `make test` works without it."""
    (tmp_path / "pytest.ini").touch()
    found = detect_tests(read_top_level(tmp_path))
    assert found is not None
    ways = [(one.command, one.environment and one.environment.setup) for one in found.alternatives]
    assert ways == [("python3 -m pytest", None), (VENV_PYTEST, f"{PIP} pytest")]
    (tmp_path / "Makefile").write_text("test:\n")
    (tmp_path / "requirements.txt").touch()
    found = detect_tests(read_top_level(tmp_path))
    assert found is not None
    assert [one.command for one in found.alternatives] == ['PATH="$PWD/.venv/bin:$PATH" make test', "make test"]


def test_unusual_files_are_ignored(tmp_path: Path) -> None:
    """A pipe, a dangling link, a huge file and a name that is not UTF-8 neither block nor raise."""
    os.mkfifo(tmp_path / "package.json")
    (tmp_path / "Makefile").symlink_to("/nowhere")
    (tmp_path / "pyproject.toml").write_text(PYTEST + "#" * (1 << 20))
    (tmp_path / "composer.json").write_bytes(b"\xff\xfe{")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")).touch()
    assert detect_tests(read_top_level(tmp_path)) is None
