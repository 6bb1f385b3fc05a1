"""Refuse state on network file systems, where flock may not exclude processes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from orchestrator.errors import RefusedError

# Excludes 9p and virtiofs, which containers and virtual machines use for local disks of their host.
NETWORK_FILE_SYSTEMS: Final = frozenset({
    "afs", "beegfs", "ceph", "cifs", "coda", "fuse.ceph", "fuse.ceph-fuse", "fuse.gcsfuse", "fuse.glusterfs",
    "fuse.juicefs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs",
    "nfs4", "ocfs2", "orangefs", "smb3", "smbfs",
})  # fmt: skip


def refuse_network_mount(path: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> None:
    """Raise RefusedError if `path` (which need not exist) is on a network file system.

    Without a mount table, nothing is refused.
    """
    found = read_mount(path, mountinfo)
    if found is not None and found[1] in NETWORK_FILE_SYSTEMS:
        mount, kind = found
        raise RefusedError(
            f"{path} is on {mount}, a network file system ({kind}) whose file locks are unreliable",
            "put the state on a local disk",
        )


def read_mount(path: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> tuple[Path, str] | None:
    """Return the mount point and file system type of a path, or None.

    The path need not exist. Reads Linux's mount table (proc_pid_mountinfo(5)); returns None without one.
    """
    try:
        table = mountinfo.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return None
    return mount_of(path.resolve(), table)


def mount_of(path: Path, table: str) -> tuple[Path, str]:
    """Return the mount point of the absolute `path` and the file system type."""
    found = (Path("/"), "")
    for line in table.splitlines():
        fields = line.split(" ")
        mount = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4]))
        # Of several mounts on the same mount point, only the last one is visible.
        if path.is_relative_to(mount) and len(mount.parts) >= len(found[0].parts):
            found = (mount, fields[fields.index("-") + 1])
    return found
