"""The bundled trackers meet the tracker contract."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator.builtin.checklist import ChecklistTracker
from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.errors import RefusedError
from orchestrator.protocols import SyncResult, TrackedState, TrackerRequest
from orchestrator.testing.tracker_contract import TrackerContract, make_state

TEXT = """\
# To do\r
\r
- [ ] Add a User model. {#models}
      With a name and an address.

      A paragraph of its own belongs to nobody.
  * [ ]   Give it *tests*!
- [x] An old one
- [X] Another
1. [ ] no item
-[ ] none either

````md
```
- [ ] In a block of code
````
+ [ ] Ünïcode ends well {#ends}   
\t- [ ] The last one, without a line break"""  # noqa: W291


class TestChecklist(TrackerContract):
    """Run the contract with a file."""

    tracker_type = ChecklistTracker

    def make_options(self, folder: Path) -> Mapping[str, Any]:
        """Write a checklist."""
        (folder / "todo.md").write_bytes(TEXT.encode())
        return {"file": str(folder / "todo.md")}

    async def test_open_items_are_tasks(self, tmp_path: Path) -> None:
        """The id is in the item or derived from its words; indented lines belong to it."""
        tasks = await self.open_tasks(self.validated(tmp_path))
        assert [(task.id, task.prompt) for task in tasks] == [
            ("models", "Add a User model.\nWith a name and an address."),
            ("give-it-tests", "Give it *tests*!"),
            ("ends", "Ünïcode ends well"),
            ("the-last-one-without-a-line-break", "The last one, without a line break"),
        ]

    async def test_tick_changes_one_byte(self, tmp_path: Path) -> None:
        """Everything else is unchanged, including the mode and a symlink to the file."""
        options = self.validated(tmp_path)
        path = tmp_path / "todo.md"
        path.rename(tmp_path / "real.md")
        path.symlink_to("real.md")
        path.chmod(0o640)
        await self.sync(options, _landed("ends"), _landed("models"))
        expected = TEXT.replace("[ ] Add a User", "[x] Add a User").replace("[ ] Ünïcode", "[x] Ünïcode")
        assert path.read_bytes() == expected.encode()
        assert path.is_symlink()
        assert path.stat().st_mode & 0o777 == 0o640
        assert sorted(path.name for path in tmp_path.iterdir()) == ["real.md", "todo.md"]

    async def test_edited_file_is_ticked_at_the_new_position(self, tmp_path: Path) -> None:
        """Moved items are found, deleted ones are no error."""
        options = self.validated(tmp_path)
        (tmp_path / "todo.md").write_text("- [ ] New\n- [ ] Add a User model {#models}\n")
        await self.sync(options, _landed("models"), _landed("ends"))
        assert (tmp_path / "todo.md").read_text() == "- [ ] New\n- [x] Add a User model {#models}\n"

    async def test_item_ticked_by_a_person_cancels_its_task(self, tmp_path: Path) -> None:
        """Unless the task has ended."""
        options = self.validated(tmp_path)
        (tmp_path / "todo.md").write_text("- [x] Add a User model {#models}\n- [x] Done {#ends}\n")
        states = make_state("models", TaskStatus.RUNNING), make_state("ends", TaskStatus.FAILED)
        assert await self.sync(options, *states) == SyncResult([TrackerRequest("ticked-models", "models", "cancel")])

    @pytest.mark.parametrize(
        ("text", "what"),
        [("- [ ] 漢字\n", "line 1: no id can be derived from '漢字'"), (None, "no such file or directory")],
    )
    async def test_invalid_list_is_rejected(self, tmp_path: Path, text: str | None, what: str) -> None:
        """The errors for a missing file and an item without an id have the fix."""
        options = self.validated(tmp_path)
        path = tmp_path / "todo.md"
        path.unlink() if text is None else path.write_text(text)
        with pytest.raises(RefusedError, match=what):
            await self.open_tasks(options)

    @pytest.mark.parametrize("by_link", [False, True])
    async def test_tracked_file_is_rejected(self, tmp_path: Path, by_link: bool) -> None:
        """Ticks would be changes in a checkout, which prevent landings; an untracked file is fine."""
        options = self.validated(tmp_path)
        if by_link:
            (tmp_path / "repository").mkdir()
            (tmp_path / "todo.md").rename(tmp_path / "repository/todo.md")
            (tmp_path / "todo.md").symlink_to("repository/todo.md")
        top = tmp_path / "repository" if by_link else tmp_path
        subprocess.run(["git", "init", "--quiet"], cwd=top, check=True)
        assert len(await self.open_tasks(options)) == 4
        subprocess.run(["git", "add", "todo.md"], cwd=top, check=True)
        with pytest.raises(RefusedError, match=r"git tracks .*todo\.md"):
            await self.open_tasks(options)


def _landed(task: str) -> TrackedState:
    return make_state(task, TaskStatus.LANDED)
