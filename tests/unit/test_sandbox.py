"""Sandbox policies translated to mounts and access rules."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from orchestrator.errors import RefusedError
from orchestrator.sandbox import bubblewrap, landlock
from orchestrator.sessions.sandbox import policy
from orchestrator.sessions.sandbox.policy import SandboxKind, SandboxPolicy, choose_sandbox, sandbox_command
from orchestrator.sessions.supervision.supervisor_client import SupervisedCommand

pytestmark = pytest.mark.sandbox


@pytest.fixture
def top(tmp_path: Path) -> Path:
    for name in ("house/hidden/tree/work/deep", "house/hidden/objects", "house/open", "scratch"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "house" / "file").touch()
    (tmp_path / "house" / "link").symlink_to("hidden")
    return tmp_path


def command(cwd: Path) -> SupervisedCommand:
    return SupervisedCommand(
        argv=["program"],
        env={"A": "b"},
        cwd=cwd,
        stdin=None,
        stdout=cwd / "out",
        stderr=cwd / "err",
        cap=1,
        timeout=1,
        grace=1,
        lock=cwd / "lock",
    )


def rules(top: Path, fence: SandboxPolicy) -> dict[str, str]:
    """Return the rules inside `top`, by relative path."""
    given = sandbox_command(SandboxKind.LANDLOCK, command(top), fence).landlock
    assert given is not None
    return {os.path.relpath(path, top): kind for path, kind in given if Path(path).is_relative_to(top)}


def test_hidden_path_is_excluded_by_granting_its_siblings(top: Path) -> None:
    """No ancestor and no symlink is granted; paths inside a hidden folder need rules of their own."""
    house = top / "house"
    fence = SandboxPolicy((house / "hidden/tree",), (house / "hidden/objects",), (house / "hidden",), top / "scratch")
    assert rules(top, fence) == {
        "house/file": "read",
        "house/open": "read",
        "house/hidden/objects": "read",
        "house/hidden/tree": "write",
        "scratch": "write",
    }


def test_hidden_path_splits_a_writable_folder(top: Path) -> None:
    """The folder itself is not granted, because a rule applies to everything below."""
    tree = top / "house/hidden/tree"
    fence = SandboxPolicy((tree,), (top / "house",), (tree / "work/deep",), top / "scratch")
    (tree / "beside").mkdir()
    assert rules(top, fence) == {
        "house/file": "read",
        "house/open": "read",
        "house/hidden/objects": "read",
        "house/hidden/tree/beside": "write",
        "scratch": "write",
    }


def test_folder_without_hidden_paths_is_granted_as_a_whole(top: Path) -> None:
    """A writable folder in a readable one needs no list of its siblings."""
    given = dict(policy._landlock_rules(SandboxPolicy((top / "house",), (top,), (), top / "scratch")))
    assert given[str(top / "house")] == "write"
    assert str(top / "house" / "open") not in given


def test_private_devices_are_hidden(top: Path) -> None:
    """The raw disk would expose all hidden files."""
    given = dict(policy._landlock_rules(SandboxPolicy((), (), (), top / "scratch")))
    assert given["/dev/null"] == given["/dev/urandom"] == "write"
    assert "/" not in given
    assert "/dev" not in given
    assert given["/usr"] == "read"


def test_mounts_are_ordered_from_the_root(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More specific paths are mounted later, and hidden paths last."""
    monkeypatch.setattr(bubblewrap, "find_bwrap", lambda: "/bin/bwrap")
    monkeypatch.setattr(bubblewrap, "can_disable_userns", lambda _: True)
    house = top / "house"
    fence = SandboxPolicy(
        (house / "hidden/tree", top / "gone"),
        (house, house / "hidden/objects"),
        (house / "link", house / "file", house / "hidden/tree/work"),
        top / "scratch",
        network=False,
    )
    given = sandbox_command(SandboxKind.BUBBLEWRAP, command(top), fence)
    options = list(given.argv)
    text = " ".join(options).replace(f"{top}/", "")
    for first, second in (
        ("--ro-bind house house", "--tmpfs house/hidden "),
        ("--tmpfs house/hidden ", "--bind house/hidden/tree house/hidden/tree"),
        ("--tmpfs house/hidden ", "--ro-bind house/hidden/objects house/hidden/objects"),
        ("--bind house/hidden/tree house/hidden/tree", "--tmpfs house/hidden/tree/work "),
        ("--tmpfs house/hidden/tree/work ", "--remount-ro house/hidden "),
        ("--ro-bind house house", "--ro-bind /dev/null house/file"),
        ("--bind scratch /tmp", "--bind scratch scratch"),
        ("--ro-bind / /", "--bind scratch /tmp"),
    ):
        assert -1 < text.find(first) < text.find(second), (first, second, text)
    assert "gone" not in text
    assert options[0] == "/bin/bwrap"
    assert "--unshare-net" in options
    assert "--disable-userns" in options
    assert options[-2:] == ["--", "program"]
    assert given.wrapped
    assert given.env == {"A": "b", "TMPDIR": "/tmp"}


def test_off_leaves_the_command_unchanged(top: Path) -> None:
    """Its temporary folder is also unchanged."""
    given = command(top)
    assert sandbox_command(SandboxKind.OFF, given, SandboxPolicy((), (), (), top / "new")) is given
    assert not (top / "new").exists()


@pytest.mark.parametrize("wanted", ["auto", "bubblewrap", "landlock"])
async def test_other_systems_support_only_off(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    """The error says so, instead of an ineffective sandbox."""
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(RefusedError, match="is not supported on this system: set `sandbox: off`"):
        await choose_sandbox(wanted, network=True, environ=os.environ)
    assert await choose_sandbox("off", network=True, environ=os.environ) is SandboxKind.OFF


@pytest.mark.parametrize(("abi", "why"), [(0, "kernel lacks it"), (2, "supports only ABI 2")])
async def test_kernel_without_landlock_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, abi: int, why: str
) -> None:
    """If neither kind works, both reasons are given."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(landlock, "abi_version", lambda: abi)
    environ = {"PATH": str(tmp_path)}
    with pytest.raises(RefusedError, match=why):
        await choose_sandbox("landlock", network=True, environ=environ)
    with pytest.raises(
        RefusedError, match=rf"`bwrap` is not on PATH; landlock: .*{why}.*install bubblewrap.*`sandbox: off`"
    ):
        await choose_sandbox("auto", network=True, environ=environ)
