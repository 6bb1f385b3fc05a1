"""Sandbox of a session: the paths it can read and write.

All paths that are not hidden can be read; only the paths declared writable can be written. The sandbox is built with
bubblewrap or Landlock; both kinds add a system call filter (`orchestrator.sandbox.seccomp`) that reduces the attack
surface of the kernel. A table in docs/security.md, which is tested, lists what each kind prevents.

A Landlock right applies to everything beneath a folder. So a folder that contains a hidden path gets no right itself;
only its other entries that exist at the start do. The folder can't be listed, and nothing can be created in it.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum
from functools import cache, partial
from pathlib import Path

import anyio
import anyio.to_thread
from tenacity import retry, retry_if_result, stop_after_attempt

from orchestrator.errors import RefusedError
from orchestrator.sandbox import bubblewrap, landlock, seccomp
from orchestrator.sessions.supervision.cli_start import WRAPPER_ERROR, WRAPPER_FILTER, WRAPPER_STATUS
from orchestrator.sessions.supervision.supervisor_client import SupervisedCommand
from orchestrator.system import process

_PROBE_TIMEOUT = 20.0  # seconds; a start takes milliseconds
_MAX_PROBE_OUTPUT = 1 << 16  # bytes
#: Folders of the machine that bubblewrap replaces with private ones.
REPLACED_FOLDERS = ("/tmp", "/var/tmp", "/run")  # noqa: S108  (not to write there)
_RESOLVER = Path("/etc/resolv.conf")
#: Excludes /dev/pts and /dev/shm: their entries belong to other processes, and a right to one is a right to all.
_NODES = ("null", "zero", "full", "random", "urandom")

_REMEDY = (
    "install bubblewrap; if it is installed but can't create user namespaces, allow them: on Ubuntu with "
    "`sysctl kernel.apparmor_restrict_unprivileged_userns=0` or an AppArmor profile for bwrap, on an old Debian "
    "with `sysctl kernel.unprivileged_userns_clone=1`, in a container with the options of its runtime"
)
_CAN_FILTER = seccomp.is_supported()
_OFF = "set `sandbox: off`, which only protects against accidents"


class SandboxKind(StrEnum):
    """The sandbox mechanism. OFF means no sandbox."""

    BUBBLEWRAP = "bubblewrap"
    LANDLOCK = "landlock"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class ProxyEndpoint:
    """The endpoint at which a session reaches its proxy: a `port` of its loopback.

    In bubblewrap the port is opened from inside, and its socket is passed out through the unix socket `socket_path`.
    """

    port: int
    socket_path: Path | None = None


@dataclass(frozen=True, slots=True)
class SandboxPolicy:
    """The access of a session; of its absolute paths, the most specific one applies.

    The paths are resolved. `writable` paths can be read and written, `readable` ones only read, even inside a hidden
    path; `hidden` ones do not exist for the session. If a path is in several lists, the first list applies. Missing
    paths are ignored. `scratch` is a folder of the session, created if needed: its /tmp (bubblewrap) and its TMPDIR.
    Without `network` the session has only a private loopback (bubblewrap) or no internet socket (Landlock), except for
    the `proxy_endpoint`. With `nesting` it may create user namespaces, and so nested sandboxes.
    """

    writable: tuple[Path, ...]
    readable: tuple[Path, ...]
    hidden: tuple[Path, ...]
    scratch: Path
    network: bool = True
    proxy_endpoint: ProxyEndpoint | None = None
    nesting: bool = False


class _Access(IntEnum):
    HIDDEN = 0
    READ = 1
    WRITE = 2


async def choose_sandbox(
    wanted: str, *, network: bool, environ: Mapping[str, str], hosts: Sequence[str] = ()
) -> SandboxKind:
    """Return the requested kind or, for `auto`, the strongest kind that works.

    A kind works if it passes a trial on this machine. `environ` provides the PATH for bubblewrap. Raises RefusedError
    if the kind does not work, or can't block the network (or all hosts except `hosts`) as required. There is no
    fallback to a weaker kind.
    """
    if wanted == SandboxKind.OFF:
        if not network:
            raise RefusedError(
                "`network: off` needs a sandbox, but `sandbox: off` is set", "set `sandbox: auto` or `network: on`"
            )
        return SandboxKind.OFF
    if sys.platform != "linux":
        raise RefusedError(f"`sandbox: {wanted}` is not supported on this system", _OFF)
    if wanted == SandboxKind.LANDLOCK:
        if reason := _landlock_problem(network, hosts):
            raise RefusedError(f"`sandbox: landlock` does not work: {reason}", f"use bubblewrap ({_REMEDY}); or {_OFF}")
        return SandboxKind.LANDLOCK
    problem = await _bubblewrap_problem(network, environ)
    if problem is None:
        return SandboxKind.BUBBLEWRAP
    if wanted == SandboxKind.BUBBLEWRAP:
        raise RefusedError(f"`sandbox: bubblewrap` does not work: {problem}", f"{_REMEDY}; or {_OFF}")
    if reason := _landlock_problem(network, hosts):
        raise RefusedError(
            f"no sandbox works on this machine: bubblewrap: {problem}; landlock: {reason}", f"{_REMEDY}; or {_OFF}"
        )
    return SandboxKind.LANDLOCK


def sandbox_command(kind: SandboxKind, command: SupervisedCommand, policy: SandboxPolicy) -> SupervisedCommand:
    """Return the command that runs `command` in a sandbox. Blocks.

    It creates the scratch folder. With Landlock, files created later next to a hidden path are inaccessible, so call
    this just before the start. Raises OSError if the folders can't be created or listed.
    """
    if kind is SandboxKind.OFF:
        return command
    policy.scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
    if kind is SandboxKind.LANDLOCK:
        env = {**command.env, "TMPDIR": str(policy.scratch.resolve())}
        limited = seccomp.UNIX if policy.proxy_endpoint is None else seccomp.STREAM
        sockets = seccomp.ALL if policy.network else limited
        return replace(
            command,
            env=env,
            landlock=tuple(_landlock_rules(policy)),
            port=None if policy.proxy_endpoint is None else policy.proxy_endpoint.port,
            filter=_filter(sockets=sockets, namespaced=False, nesting=policy.nesting),
        )
    bwrap = bubblewrap.find_bwrap()
    if bwrap is None:
        raise FileNotFoundError(2, os.strerror(2), "bwrap")
    reports = ("--json-status-fd", str(WRAPPER_STATUS), *(("--seccomp", str(WRAPPER_FILTER)) if _CAN_FILTER else ()))
    tmpdir = "/tmp" if _exists(Path("/tmp")) else str(policy.scratch.resolve())  # noqa: S108  (its own)
    inside, env = list(command.argv), {**command.env, "TMPDIR": tmpdir}
    if policy.proxy_endpoint is not None and policy.proxy_endpoint.socket_path is not None:
        inside, env = _wrap_with_loopback(policy.proxy_endpoint, policy.proxy_endpoint.socket_path, inside, env)
    argv = [bwrap, *_options(policy, bwrap), *reports, "--chdir", str(command.cwd), "--", *inside]
    sockets = seccomp.ALL if policy.network else seccomp.NAMESPACED
    denied = _filter(sockets=sockets, namespaced=True, nesting=policy.nesting)
    return replace(
        command, argv=argv, env=env, wrapped=True, uses_loopback=policy.proxy_endpoint is not None, filter=denied
    )


def _wrap_with_loopback(
    endpoint: ProxyEndpoint, socket_path: Path, argv: Sequence[str], env: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Return the command line and environment that open the endpoint and run `argv`."""
    program, needed = process.internal_program("orchestrator.sandbox.loopback", "main")
    resolved = socket_path.parent.resolve() / socket_path.name
    unset = ",".join(needed.keys() - env.keys())
    return [*program, str(resolved), str(endpoint.port), str(WRAPPER_ERROR), unset, *argv], {**needed, **env}


@cache
def _filter(*, sockets: str, namespaced: bool, nesting: bool) -> str | None:
    return seccomp.build_filter(sockets=sockets, namespaced=namespaced, nesting=nesting).hex() if _CAN_FILTER else None


def _accesses(policy: SandboxPolicy) -> dict[Path, _Access]:
    rights = (
        (_Access.HIDDEN, policy.hidden),
        (_Access.READ, policy.readable),
        (_Access.WRITE, (*policy.writable, policy.scratch)),
    )
    return {path.resolve(): access for access, paths in rights for path in paths if _exists(path)}


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a path that we can't access, a child process can't access either
        return False


# bubblewrap


async def _bubblewrap_problem(network: bool, environ: Mapping[str, str]) -> str | None:
    bwrap = bubblewrap.find_bwrap(environ)
    if bwrap is None:
        return "`bwrap` is not on PATH"
    scratch = Path(await anyio.to_thread.run_sync(tempfile.mkdtemp))
    try:
        # Use all flags, since a machine may forbid any one of them, and a program that certainly exists.
        options = await anyio.to_thread.run_sync(_options, SandboxPolicy((), (), (), scratch, network), bwrap)
        probe = [bwrap, *options, "--", bwrap, "--version"]
        done = await _probe(probe, environ)
    except (OSError, TimeoutError) as error:
        return str(error)
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(partial(shutil.rmtree, scratch, ignore_errors=True))
    if done.returncode == 0:
        return None
    return done.stderr.decode(errors="replace").strip() or f"exited with code {done.returncode}"


@retry(
    retry=retry_if_result(lambda done: done.returncode < 0),
    stop=stop_after_attempt(bubblewrap.ATTEMPTS),
    retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
)
async def _probe(argv: Sequence[str], environ: Mapping[str, str]) -> process.CompletedCommand:
    """Run a probe; repeat it if it was killed, which must not lead to a weaker sandbox."""
    # A bubblewrap that is killed during startup leaves a process behind that waits for it.
    return await process.run_untrusted(
        argv, env=environ, cwd=Path("/"), timeout=_PROBE_TIMEOUT, max_output=_MAX_PROBE_OUTPUT
    )


def _options(policy: SandboxPolicy, bwrap: str) -> list[str]:
    sealed = () if policy.nesting or not bubblewrap.can_disable_userns(bwrap) else ("--disable-userns",)
    return [*_NAMESPACES, *sealed, *(() if policy.network else ("--unshare-net",)), *_SYSTEM, *_mounts(policy)]


def _mounts(policy: SandboxPolicy) -> list[str]:
    """Return bubblewrap's mount options, from the root down: later paths override."""
    readable = (
        policy.readable if policy.proxy_endpoint is None else (*policy.readable, *process.internal_program_folders())
    )
    accesses = _accesses(replace(policy, readable=readable))
    scratch = str(policy.scratch.resolve())
    private = {path.resolve() for path in map(Path, ("/tmp", "/var/tmp")) if _exists(path)}  # noqa: S108  (hidden)
    covers = dict.fromkeys(private, _Access.HIDDEN) | _run_folder_access() | accesses
    options: list[str] = []
    sealed: list[str] = []
    for path in sorted(covers, key=lambda path: len(path.parts)):
        access, name = covers[path], str(path)
        if path in private and path not in accesses:
            options += ("--bind", scratch, name)
        elif access is not _Access.HIDDEN:
            options += ("--bind" if access is _Access.WRITE else "--ro-bind", name, name)
        elif _is_hidden_already(path, covers):
            continue
        elif path.is_dir():
            options += ("--tmpfs", name)
            sealed += ("--remount-ro", name)
        else:
            options += ("--ro-bind", os.devnull, name)  # mounted with nodev, so it can't be opened
    return [*options, *sealed]


_NAMESPACES = (
    *("--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"),
    *("--die-with-parent", "--cap-drop", "ALL"),
)
_SYSTEM = (
    *("--ro-bind", "/", "/", "--proc", "/proc"),
    *("--dev", "/dev", "--tmpfs", "/dev/shm", "--remount-ro", "/dev"),  # noqa: S108  (its own)
)


def _run_folder_access() -> dict[Path, _Access]:
    """Hide /run, with the sockets of system services, except for name resolution."""
    run = Path("/run")
    if not _exists(run):
        return {}
    resolver = _RESOLVER.resolve()
    exceptions = {resolver: _Access.READ} if resolver.is_relative_to(run) and _exists(resolver) else {}
    return {run.resolve(): _Access.HIDDEN} | exceptions


def _is_hidden_already(path: Path, covers: Mapping[Path, _Access]) -> bool:
    ancestor = next((parent for parent in path.parents if parent in covers), None)
    return ancestor is not None and covers[ancestor] is _Access.HIDDEN


# Landlock


def _landlock_problem(network: bool, hosts: Sequence[str]) -> str | None:
    if not network and not _CAN_FILTER:
        return "system calls can't be filtered on this machine, so `network: off` can't be enforced"
    version = landlock.abi_version()
    support = f"this kernel supports only ABI {version}" if version else "this kernel lacks it or has it disabled"
    if version < landlock.MIN_ABI:
        return f"{support}; ABI {landlock.MIN_ABI} (Linux 6.2) is required"
    if hosts and version < landlock.MIN_ABI_FOR_PORTS:
        return f"{support}; `network.allow` requires ABI {landlock.MIN_ABI_FOR_PORTS} (Linux 6.7), or `network: off`"
    return None


def _landlock_rules(policy: SandboxPolicy) -> Iterator[tuple[str, str]]:
    devices = {(Path("/dev") / name).resolve(): _Access.WRITE for name in _NODES if _exists(Path("/dev") / name)}
    root = Path("/")
    accesses = {root: _Access.READ, Path("/dev"): _Access.HIDDEN} | devices | _accesses(policy)
    return _grant(root, accesses[root], accesses)


def _grant(path: Path, access: _Access, accesses: Mapping[Path, _Access]) -> Iterator[tuple[str, str]]:
    """Yield the rules for `path`, per entry if an entry beneath has fewer permissions."""
    beneath = {other: right for other, right in accesses.items() if path in other.parents}
    if any(right < access for right in beneath.values()):
        for entry in sorted(_entries(path, beneath)):
            yield from _grant(entry, accesses.get(entry, access), beneath)
        return
    if access is not _Access.HIDDEN:
        yield str(path), landlock.WRITE if access is _Access.WRITE else landlock.READ
    for other, right in beneath.items():
        if not any(parent in beneath for parent in other.parents):
            yield from _grant(other, right, beneath)


def _entries(folder: Path, beneath: Iterable[Path]) -> set[Path]:
    """Return the entries of a folder without symlinks: their targets have rules."""
    try:
        with os.scandir(folder) as scan:
            entries = {Path(entry.path) for entry in scan if not entry.is_symlink()}
    except PermissionError:
        entries = set()
    return entries | {folder / path.relative_to(folder).parts[0] for path in beneath}
