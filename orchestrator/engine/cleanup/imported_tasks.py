"""Write the unfinished tasks of an imported run to a file for `council run`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import anyio.to_thread

from orchestrator.domain.runs.legacy import is_unfinished
from orchestrator.domain.runs.model import RunDocument
from orchestrator.domain.wording import join_names
from orchestrator.engine.state.records import read_tasks, task_documents
from orchestrator.errors import RefusedError
from orchestrator.protocols import Store
from orchestrator.state.legacy.importer import IMPORTED_KIND

#: Fields of an imported task that may contain its prompt, the preferred one first.
_PROMPTS: Final = ("prompt", "instructions", "description", "title")
_MAX_NAMED_TASKS: Final = 5


class UnfinishedTask(NamedTuple):
    """The id of an unfinished task, its prompt if known, and the branch with its work."""

    id: str
    prompt: str | None
    branch: str | None


async def read_unfinished_tasks(store: Store, run: RunDocument) -> list[UnfinishedTask]:
    """Return the tasks of an imported run that were running or not started."""
    tasks = task_documents(await read_tasks(store, run.id), run.tasks)
    documents = await store.list(IMPORTED_KIND, f"{run.id}/")
    originals = {one.key.id.partition("/")[2]: one.value.get("fields", {}) for one in documents if not one.damaged}
    return [
        UnfinishedTask(name, _prompt(originals.get(name, {})), task.imported.branch)
        for name, task in tasks.items()
        if task.imported is not None and is_unfinished(task.imported)
    ]


async def write_unfinished_tasks(store: Store, run: RunDocument, folder: Path) -> RefusedError:
    """Write an imported run's unfinished tasks; return a refusal that names the file.

    An existing file is left unchanged, because a user may be editing it.
    """
    tasks = await read_unfinished_tasks(store, run)
    source = run.imported.source if run.imported else ""
    message = f"run {run.id} was imported from {source} and can't be continued"
    if not tasks:
        return RefusedError(message, f"no unfinished tasks; to show the record, run `council state show {run.id}`")
    path = folder / f"{run.id}.yaml"
    await anyio.to_thread.run_sync(_write, path, render_task_file(run.id, source, tasks))
    lacking = [one.id for one in tasks if one.prompt is None]
    prompts = f", add the missing prompts of {join_names(lacking, _MAX_NAMED_TASKS)}" if lacking else ""
    left = f"{len(tasks)} unfinished {'task' if len(tasks) == 1 else 'tasks'}"
    remedy = f"{path} has its {left}: add an adapter there{prompts}, then `council run` the file"
    return RefusedError(message, f"{remedy}; `council state show {run.id}` shows the record")


def render_task_file(run: str, source: str, tasks: Sequence[UnfinishedTask]) -> str:
    """Return the content of the file, with strings as JSON, which is valid YAML."""
    lines = [
        f"# The unfinished tasks of run {run}, imported from {json.dumps(source)}. Add an adapter",
        "# (see `council init`), fill in the empty prompts, then `council run` this file.",
        "version: 1",
        "repo: ../..",
        "tasks:",
    ]
    for one in tasks:
        prompt = one.prompt or ""
        if one.prompt and one.branch:
            prompt += f"\n\nEarlier work on this is on the branch {one.branch}."
        lines += [f"  - id: {json.dumps(one.id)}", f"    prompt: {json.dumps(prompt)}"]
    return "\n".join(lines) + "\n"


def _prompt(original: Mapping[str, Any]) -> str | None:
    texts = (original.get(name) for name in _PROMPTS)
    return next((text.strip() for text in texts if isinstance(text, str) and text.strip()), None)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(text, encoding="utf-8")
