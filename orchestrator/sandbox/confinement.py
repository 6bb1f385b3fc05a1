"""Run a short program, such as git on an agent's files, with minimal permissions.

The program can read and execute itself and the system libraries, and access the given paths. It has no home, network,
capabilities or other programs, so filters, hooks and monitors in a hostile configuration can't start.

Landlock is preferred because it takes a fraction of a millisecond: the thread that starts the program is restricted,
and the program inherits the restrictions (landlock(7): a domain belongs to a thread, as do capabilities and seccomp
filters). If the kernel lacks Landlock, bubblewrap mounts the same view. If neither works, sessions are not sandboxed
either (`sandbox: off`), and the program runs with the permissions of the user.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Final, TypeVar

from orchestrator.sandbox import bubblewrap, landlock, seccomp

T = TypeVar("T")

_LIBRARIES: Final = (
    *("/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libexec", "/usr/local/lib", "/usr/local/libexec"),
    *("/lib", "/lib32", "/lib64", "/nix/store", "/gnu/store", "/snap", "/opt"),
)
#: The programs that a wrapper script needs.
_PROGRAMS: Final = ("/usr/bin", "/usr/local/bin", "/bin")
_SYSTEM_FILES: Final = (
    *("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/ld.so.preload", "/etc/localtime"),
    *("/usr/share/zoneinfo", "/dev/urandom", "/sys/devices/system/cpu"),
)
_PROBE_TIMEOUT: Final = 20.0  # seconds; a probe takes milliseconds


class Mechanism(StrEnum):
    """The mechanism that restricts the program."""

    LANDLOCK = "landlock"
    BUBBLEWRAP = "bubblewrap"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Confinement:
    """The access of a program: absolute paths, each with everything beneath.

    `program` is the executable; `libraries` are additional executable files or folders next to the system libraries.
    Missing paths are ignored.
    """

    program: Path
    libraries: tuple[Path, ...] = ()
    readable: tuple[Path, ...] = ()
    writable: tuple[Path, ...] = ()

    def start(self, argv: Sequence[str], start: Callable[[Sequence[str]], T], mechanism: Mechanism | None = None) -> T:
        """Call `start` so that its child process is confined; return its result. Blocks.

        `start` gets the command line to execute. `mechanism` is for tests; by default the best mechanism is used.
        Raises OSError if the process can't be restricted.
        """
        match mechanism or best_mechanism():
            case Mechanism.LANDLOCK:
                return _in_thread(lambda: self._start_here(argv, start))
            case Mechanism.BUBBLEWRAP:
                return start([*self._bubblewrap(), *argv])
            case Mechanism.NONE:
                return start(argv)

    def _start_here(self, argv: Sequence[str], start: Callable[[Sequence[str]], T]) -> T:
        landlock.restrict_thread(list(self._rules()))
        if seccomp.is_supported():
            seccomp.install_filter(_filter())
        return start(argv)

    def _rules(self) -> Iterator[tuple[str, str]]:
        yield from ((path, landlock.READ) for path in _executable(self.program, self.libraries))
        yield from ((path, landlock.READ_DATA) for path in (*_system_files(), *_resolved(self.readable)))
        yield from ((path, landlock.WRITE_DATA) for path in ("/dev/null", *_resolved(self.writable)))

    def _bubblewrap(self) -> Iterator[str]:
        yield from (bubblewrap.find_bwrap() or "bwrap", "--unshare-all", "--unshare-user", "--die-with-parent")
        yield from ("--cap-drop", "ALL", "--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev")
        # /lib and /bin may be symlinks to folders in /usr.
        links = (Path(path) for path in (*_LIBRARIES, *_PROGRAMS) if Path(path).is_symlink())
        yield from (part for link in links for part in ("--symlink", str(link.readlink()), str(link)))
        read = (*_executable(self.program, self.libraries), *_system_files(), *_resolved(self.readable))
        binds = [("--ro-bind", path) for path in read if not path.startswith("/dev/")]
        binds += [("--bind", path) for path in _resolved(self.writable)]
        # From the root downwards, so that more specific paths win.
        for option, path in sorted(binds, key=lambda bind: bind[1].count("/")):
            yield from (option, path, path)
        yield "--"


@cache
def _filter() -> bytes:
    return seccomp.build_filter(sockets=seccomp.NONE, namespaced=False)


def _resolved(paths: Iterable[str | Path]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(os.path.realpath(path) for path in paths if Path(path).exists()))


@cache
def _system_files() -> tuple[str, ...]:
    return _resolved(_SYSTEM_FILES)


@cache
def _executable(program: Path, libraries: tuple[Path, ...]) -> tuple[str, ...]:
    return _resolved((program, *libraries, *_LIBRARIES, *(_PROGRAMS if _is_script(program) else ())))


def _is_script(program: Path) -> bool:
    with suppress(OSError), program.open("rb") as file:
        return file.read(2) == b"#!"
    return False


def _in_thread(call: Callable[[], T]) -> T:
    """Call in a new thread, so that the restrictions end with the thread."""
    with ThreadPoolExecutor(1, "confined start") as executor:
        return executor.submit(call).result()


@cache
def best_mechanism() -> Mechanism:
    """Return the best mechanism that works on this machine. Blocks on the first call."""
    if sys.platform != "linux":
        return Mechanism.NONE
    if landlock.abi_version() >= landlock.MIN_ABI:
        return Mechanism.LANDLOCK
    bwrap = bubblewrap.find_bwrap()
    if bwrap is None:
        return Mechanism.NONE
    confinement = Confinement(Path(bwrap))
    try:
        done = confinement.start([bwrap, "--version"], _probe, Mechanism.BUBBLEWRAP)
    except (OSError, subprocess.SubprocessError):
        return Mechanism.NONE
    return Mechanism.NONE if done else Mechanism.BUBBLEWRAP


def _probe(argv: Sequence[str]) -> int:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_TIMEOUT, check=False)
    return done.returncode
