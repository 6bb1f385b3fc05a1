"""Network file systems are detected by the kernel's mount table."""

from pathlib import Path

import pytest

from orchestrator.errors import RefusedError
from orchestrator.state.log.mounts import mount_of, refuse_network_mount

TABLE = r"""22 1 0:21 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:30 / /home rw,relatime shared:2 master:1 - nfs4 server:/home rw,vers=4.2
31 30 0:31 / /home/me/local\040disk rw - xfs /dev/vdb rw
32 22 0:32 / /ws rw - nfs old:/ws rw
33 22 0:33 / /ws rw - 9p host rw
34 22 0:34 / /mnt/far rw - fuse.sshfs far:/ rw
"""


@pytest.mark.parametrize(
    ("path", "mount", "kind"),
    [
        ("/srv/state", "/", "ext4"),
        ("/homely/state", "/", "ext4"),
        ("/home/me/state", "/home", "nfs4"),
        ("/home/me/local disk/state", "/home/me/local disk", "xfs"),
        ("/ws/state", "/ws", "9p"),
        ("/mnt/far", "/mnt/far", "fuse.sshfs"),
    ],
)
def test_innermost_top_mount_counts(path: str, mount: str, kind: str) -> None:
    """The deepest mount point above a path counts, and the last of several mounts there."""
    assert mount_of(Path(path), TABLE) == (Path(mount), kind)


def test_network_mount_is_rejected_by_name(tmp_path: Path) -> None:
    """The error names the mount and the fix; local mounts pass."""
    table = tmp_path / "mountinfo"
    table.write_text(TABLE)
    with pytest.raises(RefusedError, match=r"/mnt/far.*fuse\.sshfs.*local disk"):
        refuse_network_mount(Path("/mnt/far/state"), table)
    refuse_network_mount(Path("/srv/state"), table)


def test_missing_mount_table_rejects_nothing(tmp_path: Path) -> None:
    """Any path passes where the kernel has no mount table."""
    refuse_network_mount(tmp_path, tmp_path / "missing")
