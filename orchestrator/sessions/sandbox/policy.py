"""What a session may touch: a fence of folders, put up by bubblewrap or by Landlock.

Everything of the machine can be read that is not hidden, and nothing can be written but what is said to be
writable.

With both, a filter of system calls (`orchestrator.sandbox.seccomp`) closes ways into the kernel. What the two keep
is a table in docs/security.md, which is tested.

With Landlock a right holds for all that is beneath a folder. So a folder that has something hidden in it is not
granted itself, only what else was in it at the start: it can't be listed, and nothing can be made in it.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
from tenacity import retry, retry_if_result, stop_after_attempt

from orchestrator.errors import RefusedError
from orchestrator.sandbox import bubblewrap, landlock, seccomp
from orchestrator.sessions.supervision.supervisor import WRAPPER_ERROR, WRAPPER_FILTER, WRAPPER_STATUS
from orchestrator.sessions.supervision.supervisor_client import SupervisedCommand
from orchestrator.system import process

_PROBE_TIMEOUT = 20.0  # seconds; a start takes milliseconds
_PROBE_OUTPUT = 1 << 16  # bytes
#: Folders of the machine in whose place a session has others of its own, with bubblewrap.
REPLACED_FOLDERS = ("/tmp", "/var/tmp", "/run")
_RESOLVER = Path("/etc/resolv.conf")
#: Without /dev/pts and /dev/shm: what is in there is others', and a right to one of them is a right to all.
_NODES = ("null", "zero", "full", "random", "urandom")

_REMEDY = (
    "install bubblewrap; if it is there but may not make user namespaces, allow them: on Ubuntu by "
    "`sysctl kernel.apparmor_restrict_unprivileged_userns=0` or an AppArmor profile for bwrap, on an old Debian "
    "by `sysctl kernel.unprivileged_userns_clone=1`, in a container by its runtime's options"
)
_CAN_FILTER = seccomp.is_supported()
_OFF = "write `sandbox: off`, which protects from accidents only"


class SandboxKind(StrEnum):
    """What puts up the fence; OFF: there is none."""

    BUBBLEWRAP = "bubblewrap"
    LANDLOCK = "landlock"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class ProxyEndpoint:
    """Where a session reaches its proxy: a `port` of its loopback.

    In a bubblewrap the port is opened from inside, and its socket passed on at the unix socket `meeting`.
    """

    port: int
    socket_path: Path | None = None


@dataclass(frozen=True, slots=True)
class SandboxPolicy:
    """What a session may touch: absolute paths, of which the more specific ones count, with symlinks resolved.

    `writable` may be read and written, `readable` only read, also inside something hidden, and `hidden` is not
    there at all; of the same path in several of them the first counts. What does not exist is passed over.
    `scratch` is a folder of the session's own, made if needed: its /tmp (bubblewrap) and its TMPDIR. Without
    `network` there is only a loopback of its own (bubblewrap), or no internet socket at all (Landlock), but for an
    `inlet`, through which it reaches a proxy. With `nesting` it may make user namespaces, and so sandboxes of its own.
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
    """Return the kind that `wanted` names, or for `auto` the strongest that works here, which is tried out.

    `environ` has the PATH on which bubblewrap is looked for. Raises RefusedError if it does not work, or can't
    keep a session off the network although that is wanted, or off all but `hosts`: nothing weaker is taken instead.
    """
    if wanted == SandboxKind.OFF:
        if not network:
            raise RefusedError(
                "without a sandbox no session can be kept off the network", "write `sandbox: auto`, or `network: on`"
            )
        return SandboxKind.OFF
    if sys.platform != "linux":
        raise RefusedError(f"`sandbox: {wanted}` does not work on this system, only `off` does", _OFF)
    if wanted == SandboxKind.LANDLOCK:
        if why := _landlock_problem(network, hosts):
            raise RefusedError(f"`sandbox: landlock` does not work: {why}", f"use bubblewrap ({_REMEDY}); or {_OFF}")
        return SandboxKind.LANDLOCK
    problem = await _bubblewrap_problem(network, environ)
    if problem is None:
        return SandboxKind.BUBBLEWRAP
    if wanted == SandboxKind.BUBBLEWRAP:
        raise RefusedError(f"`sandbox: bubblewrap` does not work: {problem}", f"{_REMEDY}; or {_OFF}")
    if why := _landlock_problem(network, hosts):
        raise RefusedError(f"no sandbox works here: bubblewrap: {problem}; landlock: {why}", f"{_REMEDY}; or {_OFF}")
    return SandboxKind.LANDLOCK


def sandbox_command(kind: SandboxKind, command: SupervisedCommand, fence: SandboxPolicy) -> SupervisedCommand:
    """Return the command that runs `command` behind `fence`. Blocks: it makes the scratch folder and lists folders.

    What is made later beside something hidden is out of reach with Landlock, so call it just before the start.
    Raises OSError.
    """
    if kind is SandboxKind.OFF:
        return command
    fence.scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
    if kind is SandboxKind.LANDLOCK:
        env = {**command.env, "TMPDIR": str(fence.scratch.resolve())}
        limited = seccomp.UNIX if fence.proxy_endpoint is None else seccomp.STREAM
        sockets = seccomp.ALL if fence.network else limited
        return replace(
            command,
            env=env,
            landlock=tuple(_landlock_rules(fence)),
            port=None if fence.proxy_endpoint is None else fence.proxy_endpoint.port,
            filter=_filter(sockets=sockets, namespaced=False, nesting=fence.nesting),
        )
    bwrap = bubblewrap.find_bwrap()
    if bwrap is None:
        raise FileNotFoundError(2, os.strerror(2), "bwrap")
    reports = ("--json-status-fd", str(WRAPPER_STATUS), *(("--seccomp", str(WRAPPER_FILTER)) if _CAN_FILTER else ()))
    tmpdir = "/tmp" if _exists(Path("/tmp")) else str(fence.scratch.resolve())
    inside, env = list(command.argv), {**command.env, "TMPDIR": tmpdir}
    if fence.proxy_endpoint is not None and fence.proxy_endpoint.socket_path is not None:
        inside, env = _wrap_with_loopback(fence.proxy_endpoint, fence.proxy_endpoint.socket_path, inside, env)
    argv = [bwrap, *_options(fence, bwrap), *reports, "--chdir", str(command.cwd), "--", *inside]
    sockets = seccomp.ALL if fence.network else seccomp.NAMESPACED
    denied = _filter(sockets=sockets, namespaced=True, nesting=fence.nesting)
    return replace(
        command, argv=argv, env=env, wrapped=True, uses_loopback=fence.proxy_endpoint is not None, filter=denied
    )


def _wrap_with_loopback(
    inlet: ProxyEndpoint, meeting: Path, argv: Sequence[str], env: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Return the command line and environment of the program that opens the inlet and then becomes `argv`."""
    program, needed = process.internal_program("orchestrator.sandbox.loopback", "main")
    place = meeting.parent.resolve() / meeting.name
    unset = ",".join(needed.keys() - env.keys())
    return [*program, str(place), str(inlet.port), str(WRAPPER_ERROR), unset, *argv], {**needed, **env}


def _filter(*, sockets: str, namespaced: bool, nesting: bool) -> str | None:
    return seccomp.build_filter(sockets=sockets, namespaced=namespaced, nesting=nesting).hex() if _CAN_FILTER else None


def _accesses(fence: SandboxPolicy) -> dict[Path, _Access]:
    rights = (
        (_Access.HIDDEN, fence.hidden),
        (_Access.READ, fence.readable),
        (_Access.WRITE, (*fence.writable, fence.scratch)),
    )
    return {path.resolve(): access for access, paths in rights for path in paths if _exists(path)}


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # what we can't reach, what we start can't reach either
        return False


# bubblewrap


async def _bubblewrap_problem(network: bool, environ: Mapping[str, str]) -> str | None:
    bwrap = bubblewrap.find_bwrap(environ)
    if bwrap is None:
        return "there is no `bwrap` on PATH"
    scratch = Path(await anyio.to_thread.run_sync(tempfile.mkdtemp))
    try:
        # The flags that are used, since a machine may forbid any one of them; the program is one that surely is there.
        options = await anyio.to_thread.run_sync(_options, SandboxPolicy((), (), (), scratch, network), bwrap)
        probe = [bwrap, *options, "--", bwrap, "--version"]
        # A bubblewrap that is killed as it starts leaves a process behind that waits for it.
        done = await _probe(probe, environ)
    except (OSError, TimeoutError) as error:
        return str(error)
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(partial(shutil.rmtree, scratch, ignore_errors=True))
    if done.returncode == 0:
        return None
    return done.stderr.decode(errors="replace").strip() or f"it ended with exit code {done.returncode}"


@retry(
    retry=retry_if_result(lambda done: done.returncode < 0),
    stop=stop_after_attempt(bubblewrap.ATTEMPTS),
    retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
)
async def _probe(argv: Sequence[str], environ: Mapping[str, str]) -> process.CompletedCommand:
    """Run it again where somebody kills it: a weaker sandbox must not be taken for that."""
    # Killed as it starts, it leaves a process behind that waits for it.
    return await process.run_untrusted(argv, env=environ, cwd=Path("/"), timeout=_PROBE_TIMEOUT, most=_PROBE_OUTPUT)


def _options(fence: SandboxPolicy, bwrap: str) -> list[str]:
    sealed = () if fence.nesting or not bubblewrap.can_disable_userns(bwrap) else ("--disable-userns",)
    return [*_NAMESPACES, *sealed, *(() if fence.network else ("--unshare-net",)), *_SYSTEM, *_mounts(fence)]


def _mounts(fence: SandboxPolicy) -> list[str]:
    """Return bubblewrap's options: mounts from the root downwards, so that what is more specific is on top."""
    readable = (
        fence.readable if fence.proxy_endpoint is None else (*fence.readable, *process.internal_program_folders())
    )
    accesses = _accesses(replace(fence, readable=readable))
    scratch = str(fence.scratch.resolve())
    private = {path.resolve() for path in map(Path, ("/tmp", "/var/tmp")) if _exists(path)}
    covers = dict.fromkeys(private, _Access.HIDDEN) | _run_folder_access() | accesses
    options: list[str] = []
    sealed: list[str] = []
    for path in sorted(covers, key=lambda path: len(path.parts)):
        access, place = covers[path], str(path)
        if path in private and path not in accesses:
            options += ("--bind", scratch, place)
        elif access is not _Access.HIDDEN:
            options += ("--bind" if access is _Access.WRITE else "--ro-bind", place, place)
        elif _is_hidden_already(path, covers):
            continue
        elif path.is_dir():
            options += ("--tmpfs", place)
            sealed += ("--remount-ro", place)
        else:
            options += ("--ro-bind", os.devnull, place)  # mounted without devices, so that it can't be opened
    return [*options, *sealed]


_NAMESPACES = (
    *("--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"),
    *("--die-with-parent", "--cap-drop", "ALL"),
)
_SYSTEM = (
    *("--ro-bind", "/", "/", "--proc", "/proc"),
    *("--dev", "/dev", "--tmpfs", "/dev/shm", "--remount-ro", "/dev"),
)


def _run_folder_access() -> dict[Path, _Access]:
    """Hide /run, where the sockets of the machine's services are, but not who resolves names."""
    run = Path("/run")
    if not _exists(run):
        return {}
    resolver = _RESOLVER.resolve()
    named = {resolver: _Access.READ} if resolver.is_relative_to(run) and _exists(resolver) else {}
    return {run.resolve(): _Access.HIDDEN} | named


def _is_hidden_already(path: Path, covers: Mapping[Path, _Access]) -> bool:
    above = next((parent for parent in path.parents if parent in covers), None)
    return above is not None and covers[above] is _Access.HIDDEN


# Landlock


def _landlock_problem(network: bool, hosts: Sequence[str]) -> str | None:
    if not network and not _CAN_FILTER:
        return "this machine's system calls can't be filtered, so that it can't keep a session off the network"
    version = landlock.abi_version()
    has = f"this kernel has only its ABI {version}" if version else "this kernel has none, or has it switched off"
    if version < landlock.MIN_ABI:
        return f"{has}, and ABI {landlock.MIN_ABI} (Linux 6.2) is needed"
    if hosts and version < landlock.MIN_ABI_FOR_PORTS:
        return f"{has}, and `network.allow` needs ABI {landlock.MIN_ABI_FOR_PORTS} (Linux 6.7), or `network: off`"
    return None


def _landlock_rules(fence: SandboxPolicy) -> Iterator[tuple[str, str]]:
    devices = {(Path("/dev") / name).resolve(): _Access.WRITE for name in _NODES if _exists(Path("/dev") / name)}
    root = Path("/")
    accesses = {root: _Access.READ, Path("/dev"): _Access.HIDDEN} | devices | _accesses(fence)
    return _grant(root, accesses[root], accesses)


def _grant(path: Path, access: _Access, accesses: Mapping[Path, _Access]) -> Iterator[tuple[str, str]]:
    """Yield the rules for `path` and all beneath: as a whole, or entry by entry where something is taken away."""
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
    """Return what is in a folder; a symlink gives no right, what it leads to has its own."""
    try:
        with os.scandir(folder) as entries:
            found = {Path(entry.path) for entry in entries if not entry.is_symlink()}
    except PermissionError:
        found = set()
    return found | {folder / path.relative_to(folder).parts[0] for path in beneath}
