"""Run a command as on a machine without bubblewrap, without Landlock, or without both.

    python -m tests.without_sandbox bubblewrap landlock -- pytest tests/integration

Without bubblewrap, PATH has every program except `bwrap`. Without Landlock, a seccomp filter answers its system calls
with ENOSYS, like a kernel built without it. Both apply to all processes of the command.
"""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from orchestrator.sandbox import seccomp

KINDS = ("bubblewrap", "landlock")
#: landlock_create_ruleset, landlock_add_rule, landlock_restrict_self: the same on all architectures but alpha.
_FIRST, _LAST = 444, 446
_LOAD, _AT_LEAST, _MORE_THAN, _RETURN = 0x20, 0x35, 0x25, 0x06  # see linux/bpf_common.h
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000


def deny_landlock() -> None:
    """Hide Landlock from this process and its children."""
    operations = [
        (_LOAD, 0, 0, 0),  # the system call number
        (_AT_LEAST, 0, 2, _FIRST),
        (_MORE_THAN, 1, 0, _LAST),
        (_RETURN, 0, 0, _FAIL | errno.ENOSYS),
        (_RETURN, 0, 0, _ALLOW),
    ]
    seccomp.install_filter(b"".join(struct.pack("=HBBI", *operation) for operation in operations))


def path_without(program: str, path: str, folder: Path) -> str:
    """Return `path` with each directory that has the program replaced by one of links to its other programs."""
    directories = []
    for number, directory in enumerate(map(Path, path.split(os.pathsep))):
        if (directory / program).exists():
            links = folder / str(number)
            links.mkdir()
            for entry in directory.iterdir():
                if entry.name != program:
                    (links / entry.name).symlink_to(entry)
            directories.append(links)
        else:
            directories.append(directory)
    return os.pathsep.join(map(str, directories))


def main(arguments: Sequence[str]) -> int:
    """Run the command after `--` and return its exit code."""
    end = arguments.index("--")
    missing, command = arguments[:end], arguments[end + 1 :]
    if unknown := set(missing) - set(KINDS):
        raise SystemExit(f"error: unknown sandbox {', '.join(sorted(unknown))} (use {' or '.join(KINDS)})")
    with tempfile.TemporaryDirectory(prefix="without-sandbox-") as folder:
        environ = dict(os.environ)
        if "bubblewrap" in missing:
            environ["PATH"] = path_without("bwrap", environ["PATH"], Path(folder))
        if "landlock" in missing:
            deny_landlock()
        return subprocess.run(command, env=environ, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
