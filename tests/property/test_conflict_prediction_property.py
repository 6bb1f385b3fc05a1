"""Predictions from unfinished files agree with git's merge of the committed files."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import hermetic_environ
from tests.edits import rename
from tests.hub_fixture import HubFixture
from tests.hypothesis_settings import example_settings
from tests.trial_sessions import open_trial_sessions

pytestmark = pytest.mark.extended

_FILES = ("a", "b", "sub/a", "sub/b", "sub/deep/a", "other/a")
_PATHS = (*_FILES, "new", "sub/new", "x.log", "sub", "sub/deep", "made", "made/a")
_MOST = 12


def _write(top: Path, path: str, line: int) -> None:
    """Replace one line of a file, or create the file."""
    (top / path).parent.mkdir(parents=True, exist_ok=True)
    lines = (top / path).read_text().splitlines() if (top / path).exists() else ["", ""]
    lines[line % len(lines)] = f"{top.parent.name} {line}"
    (top / path).write_text("\n".join(lines) + "\n")


def _remove(top: Path, path: str, _: int) -> None:
    shutil.rmtree(top / path) if (top / path).is_dir() else (top / path).unlink()


def _move(top: Path, path: str, number: int) -> None:
    rename(top, path, _PATHS[number % len(_PATHS)])


def _turn_mode(top: Path, path: str, _: int) -> None:
    (top / path).chmod((top / path).stat().st_mode ^ 0o100)


def _link(top: Path, path: str, number: int) -> None:
    (top / path).symlink_to(f"target{number}")


Step = tuple[Callable[[Path, str, int], None], str, int]
_steps = st.lists(
    st.tuples(
        st.sampled_from((_write, _write, _remove, _move, _turn_mode, _link)),
        st.sampled_from(_PATHS),
        st.integers(0, 30),
    ),
    max_size=4,
)


def _git(top: Path, environ: dict[str, str], *args: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
    identity = ("-c", "user.name=U", "-c", "user.email=u@example.org")
    done = subprocess.run(["git", *identity, *args], cwd=top, env=environ, capture_output=True, text=True, check=False)
    assert code is None or done.returncode == code, done.stderr
    return done


def _apply(top: Path, steps: Sequence[Step]) -> None:
    for edit, path, number in steps:
        with suppress(OSError):
            edit(top, path, number)


@example_settings(_MOST, deadline=None)
@given(st.lists(st.tuples(_steps, _steps), min_size=1, max_size=4))
def test_predictions_agree_with_merges_of_commits(rounds: list[tuple[list[Step], list[Step]]]) -> None:
    """For all edits of files and folders by two sessions, in a few rounds: each merges only what may have changed."""
    with TemporaryDirectory() as made:
        folder = Path(made)
        environ = hermetic_environ(folder) | {"TMPDIR": made}
        top = folder / "repository"
        top.mkdir()
        _git(top, environ, "init", "-q", "-b", "main")
        for number, path in enumerate(_FILES):
            (top / path).parent.mkdir(exist_ok=True, parents=True)
            (top / path).write_text("".join(f"{number} {line}\n" for line in range(12)))
        (top / ".gitignore").write_text("*.log\n")
        _git(top, environ, "add", "--all")
        _git(top, environ, "commit", "-q", "-m", "Begin")
        anyio.run(_compare, folder, environ, rounds)


async def _compare(folder: Path, environ: dict[str, str], rounds: Sequence[tuple[list[Step], list[Step]]]) -> None:
    top = folder / "repository"
    fixture = await HubFixture.of(top, folder / "council-home", environ)
    async with open_trial_sessions(fixture) as sessions:
        await sessions.predict()
        for one, other in rounds:
            _apply(sessions.one, one)
            _apply(sessions.other, other)
            found = await sessions.predict()
            commits = [_commit(top, environ, tree, folder) for tree in (sessions.one, sessions.other)]
            merged = _git(
                top, environ, "merge-tree", "--write-tree", "--name-only", "-z", "--no-messages", *commits, code=None
            )
            assert (found is None) == (merged.returncode == 0), (found, merged.stdout)


def _commit(top: Path, environ: dict[str, str], tree: Path, folder: Path) -> str:
    """Commit the files of a checkout as git itself finds them."""
    own = {**environ, "GIT_DIR": str(top / ".git"), "GIT_WORK_TREE": str(tree), "GIT_INDEX_FILE": str(folder / "index")}
    (folder / "index").unlink(missing_ok=True)
    _git(top, own, "read-tree", "main")
    _git(tree, own, "add", "--all")
    written = _git(tree, own, "write-tree").stdout.strip()
    return _git(tree, own, "commit-tree", written, "-p", "main", "-m", "work").stdout.strip()
