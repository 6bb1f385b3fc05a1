"""The example plugins install like any plugin, pass their own tests, and do what the guide says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import Repository
from tests.sandboxes import needs_sandbox

ROOT = Path(__file__).parents[3]
GUIDE = (ROOT / "docs/plugins.md").read_text()

#: A paragraph that names a file, and the block after it; or a block alone.
_BLOCK = re.compile(r"(?:^`([^`\n]+)`:\n\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Environment:
    """A virtual environment that adds the installed test packages to the current ones."""

    folder: Path
    variables: dict[str, str]

    def run(self, *command: str, cwd: Path) -> str:
        """Run a command in it and return its output; it must succeed."""
        done = subprocess.run(
            command,
            cwd=cwd,
            env=self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def install(self, source: Path) -> str:
        """Build a wheel of a distribution and install it, offline."""
        return self.run("python", "-m", "pip", "install", "--quiet", str(source), cwd=self.folder)


@pytest.fixture
def environment(tmp_path: Path, environ: dict[str, str]) -> Environment:
    """Yield a new environment with `python`, `council` and all packages installed for these tests."""
    folder = tmp_path / "env"
    venv.create(folder, symlinks=True)
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    line = f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n"
    (Path(paths["purelib"]) / "shared.pth").write_text(line)
    council = folder / "bin/council"
    council.write_text(f"#!{folder}/bin/python\nfrom orchestrator.cli.main import main\nmain()\n")
    council.chmod(0o755)
    # No index is used: all build and run requirements are installed already.
    offline = {
        "PIP_NO_INDEX": "1",
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    path = os.pathsep.join((str(folder / "bin"), os.environ["PATH"]))
    return Environment(folder, {**environ, **offline, "PATH": path, "PIP_CONFIG_FILE": os.devnull})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plugin", "webhook"])
def test_example_installs_as_a_wheel_and_passes_its_tests(environment: Environment, tmp_path: Path, name: str) -> None:
    """Installed into a new environment, found by `council` there, and tested there."""
    source = tmp_path / name
    shutil.copytree(ROOT / "examples" / name, source, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    environment.install(source)
    tests = tmp_path / "tests"
    (source / "tests").rename(tests)
    shutil.copy(source / "pyproject.toml", tests)
    said = environment.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=tests)
    assert re.search(r"\b\d{2} passed", said), said
    code = "from orchestrator.plugins import load_plugins as load; found = load(); print(found.loaded, found.left_out)"
    found = environment.run("python", "-c", code, cwd=tmp_path)
    assert {"plugin": "name='patch', distribution='council-patch'", "webhook": "name='webhook'"}[name] in found
    assert found.endswith("] []\n")


def test_guide_shows_the_examples_unchanged() -> None:
    """The typed code equals the tested and shipped code."""
    shown = {name: text for name, _, text in _BLOCK.findall(GUIDE) if name.startswith("council-patch/")}
    assert len(shown) == 3
    for name, text in shown.items():
        assert text == (ROOT / "examples/plugin" / name.removeprefix("council-patch/")).read_text(), name


@pytest.mark.skipif(shutil.which("patch") is None, reason="patch(1) is not installed")
@needs_sandbox
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_guide_can_be_followed_literally(environment: Environment, tmp_path: Path) -> None:
    """Each file is written, each command run in turn, and each piece of output compared."""
    folder = tmp_path / "guide"
    folder.mkdir()
    said, kinds = "", []
    for name, kind, text in _BLOCK.findall(GUIDE):
        kinds.append(kind)
        if kind == "sh":
            said = environment.run("sh", "-ec", text, cwd=folder)
        elif kind == "text":
            assert all(line in said for line in text.splitlines()), said
        else:
            assert name, f"unknown kind of block:\n{text}"
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    assert (kinds.count("sh"), kinds.count("text")) == (7, 2)


@pytest.mark.skipif(shutil.which("patch") is None, reason="patch(1) is not installed")
async def test_unsuitable_patch_fails_after_one_attempt(repository: Repository) -> None:
    """The example's verdict reaches the result, with the output of patch; a valid patch lands."""
    repository.environ["PYTHONPATH"] = str(ROOT / "examples/plugin")
    information = repository.top.parent / "site/council_patch-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: council-patch\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[cli_council]\npatch = council_patch\n")
    repository.environ["PYTHONPATH"] += os.pathsep + str(information.parent)
    patch = "--- a/README.md\n+++ b/README.md\n@@ -1 +1 @@\n-{}\n+# A project\n"
    tasks = [
        {"id": "stale", "prompt": patch.format("# Something else")},
        {"id": "fresh", "prompt": patch.format("# Project")},
    ]
    ended = repository.council("run", str(repository.configure(tasks, adapters={"p": {"use": "patch"}})), "--json")
    assert ended.states == {"stale": "failed", "fresh": "landed"}, ended
    stale, _ = ended.result["tasks"]
    assert (stale["attempts"], stale["failure"]) == (1, "refused")
    assert stale["reason"].startswith("the patch does not apply: Hunk #1 FAILED at 1")
    assert (repository.top / "README.md").read_text() == "# A project\n"
    await repository.assert_invariants()
