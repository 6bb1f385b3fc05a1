"""Check references between parts of a file, and to files and folders outside.

Each check works on raw nodes, so that one error does not hide another. Values of invalid types are skipped, because
schema validation reports them.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Final

from orchestrator.client.commands import MCP_SERVER_NAME
from orchestrator.config.coordination import explain_duration_conflict, find_duration_conflicts
from orchestrator.config.schema import MAX_TASKS
from orchestrator.config.source.document import Node
from orchestrator.config.source.files import read_prompt
from orchestrator.config.source.problems import Position, Problems
from orchestrator.config.source.validation import reject_empty_keys, validate
from orchestrator.domain.scheduling.dependencies import find_cycles
from orchestrator.domain.security.secrets import has_secret_key
from orchestrator.domain.settings.names import check_path, check_repo, is_url
from orchestrator.domain.settings.run_settings import CoordinationSettings
from orchestrator.domain.wording import quote_text, suggest
from orchestrator.errors import InvalidValue

_MOST_NAMED: Final = 8


def iter_task_nodes(root: Node) -> Iterator[tuple[int, Node]]:
    """Yield each task that is a mapping, with its index in the list."""
    tasks = root.get("tasks")
    for index, task in tasks.children.items() if tasks is not None else ():
        if isinstance(index, int) and isinstance(task.value, dict):
            yield index, task


def check_size(root: Node, problems: Problems) -> bool:
    """Return whether the task count is allowed; otherwise report only this problem."""
    tasks = root.get("tasks")
    if tasks is None or len(tasks.children) <= MAX_TASKS:
        return True
    problems.add(tasks.at, f"too many tasks: {len(tasks.children)}", f"split them into runs of at most {MAX_TASKS}")
    return False


def _check_required_sections(root: Node, problems: Problems) -> None:
    """Report missing adapters, or missing tasks without a tracker."""
    if root.get("adapters") is None:
        problems.add(root.at, "no adapter is set", "add `defaults: {adapter: NAME}`, or `adapters:` with an entry")
    tasks, trackers = root.get("tasks"), root.get("trackers")
    if trackers is not None and trackers.children:
        return
    if tasks is None:
        problems.add(root.at, "the key 'tasks' is missing", "add `tasks:` here")
    elif tasks.value == []:
        problems.add(tasks.at, "tasks is an empty list", "add at least 1")


def _check_empty_keys(root: Node, problems: Problems) -> None:
    """Report optional keys without a value."""
    for node in (root, root.get("defaults"), root.get("defaults", "backoff")):
        reject_empty_keys(node, problems)
    for section in ("worktrees", "state", "coordination", "pull_requests"):
        reject_empty_keys(root.get(section), problems)
    for step in iter_items(root.get("worktrees", "setup")):
        reject_empty_keys(step if isinstance(step.value, dict) else None, problems)
    for section in ("adapters", "mcp_servers", "sinks", "trackers"):
        entries = root.get(section)
        for entry in entries.children.values() if entries is not None else ():
            reject_empty_keys(entry, problems)
    for _, task in iter_task_nodes(root):
        reject_empty_keys(task, problems)
        reject_empty_keys(task.get("backoff"), problems)


def _check_folder(root: Node, folder: Path, problems: Problems) -> None:
    """Report a repository path that is not a folder."""
    repo = root.get("repo")
    if repo is None or not isinstance(repo.value, str):
        return
    try:
        if is_url(check_repo(repo.value)):
            return
        is_folder = (folder / repo.value).is_dir()
    except ValueError:
        return
    except OSError:
        is_folder = False
    if not is_folder:
        problems.add(
            repo.at, f"there is no folder {quote_text(repo.value)}", "use a path relative to this file, or a URL"
        )


def _check_pull_requests(root: Node, problems: Problems) -> None:
    """Report a repository on this machine, whose branches have no pull requests."""
    entry, repo = root.get("pull_requests"), root.get("repo")
    if entry is None or (repo is not None and (not isinstance(repo.value, str) or is_url(repo.value))):
        return
    remedy = "write it as `repo:`; `git remote get-url origin` prints it"
    problems.add((repo or entry).at, "pull requests need the URL of the repository on the forge", remedy)


def _check_state(root: Node, problems: Problems) -> None:
    """Report duplicate settings of the store, and an invalid folder."""
    folder, state = root.get("state_dir"), root.get("state")
    if folder is None:
        return
    if state is not None and (isinstance(state.value, str) or state.get("url") is not None):
        problems.add(folder.at, "`state` already sets the store", "remove one of the two")
    if isinstance(folder.value, str) and "\0" in folder.value:
        problems.add(folder.at, "a path can't contain a NUL character", "use a path relative to this file")


def _check_coordination(root: Node, problems: Problems) -> None:
    """Report conflicting durations of `coordination`, including defaults."""
    node = root.get("coordination")
    if node is None or not isinstance(node.value, dict):
        return
    found = validate(CoordinationSettings, node, Problems(""))
    if found is None:  # reported by schema validation
        return
    config = CoordinationSettings.model_validate(found.model_dump())
    for conflict in find_duration_conflicts(config):
        at = node.get(conflict.short) or node.get(conflict.long) or node
        problems.add(at.at, *explain_duration_conflict(conflict, config))


def _check_network(root: Node, problems: Problems) -> None:
    """Report network limits without a sandbox."""
    network, sandbox = root.get("network"), root.get("sandbox")
    if network is None or sandbox is None:
        return
    is_limited = network.value == "off" or isinstance(network.value, dict)
    if is_limited and sandbox.value == "off":
        written = "off" if network.value == "off" else "{allow: …}"
        message = f"`network: {written}` needs a sandbox, but `sandbox: off` disables it"
        problems.add(network.at, message, "use `sandbox: auto`, or `network: on`")


def _check_copied_files(root: Node, problems: Problems) -> None:
    """Report duplicate files to copy or link, and any for a remote repository."""
    repo = root.get("repo")
    is_remote = repo is not None and isinstance(repo.value, str) and is_url(repo.value)
    found: dict[str, Position] = {}
    for key in ("copy", "link"):
        for item in iter_items(root.get("worktrees", key)):
            try:
                path = check_path(item.value) if isinstance(item.value, str) else None
            except ValueError:
                continue
            if is_remote:
                message = f"`{key}` needs a checkout, and a repository by URL has none"
                problems.add(
                    item.at,
                    message,
                    "create the files with a command under `setup:`, or set `repo` to the path of a clone",
                )
            elif path is not None and found.setdefault(path, item.at) != item.at:
                problems.add(item.at, f"{quote_text(path)} is already listed {found[path]}", "list it once")
    for path, at in found.items():
        above = next((str(one) for one in PurePosixPath(path).parents if str(one) in found), None)
        if above is not None:
            problems.add(
                at,
                f"{quote_text(path)} is in {quote_text(above)}, which is already listed {found[above]}",
                "remove one of the two",
            )


def iter_items(listed: Node | None) -> Iterator[Node]:
    """Yield the items of a list; nothing for other nodes."""
    if listed is not None and isinstance(listed.value, list):
        yield from listed.children.values()


def check_ids(root: Node, problems: Problems) -> None:
    """Report duplicate ids, ignoring case: folder names may be case-insensitive."""
    first: dict[str, tuple[str, Position]] = {}
    for _, task in iter_task_nodes(root):
        found = task.get("id")
        if found is None or not isinstance(found.value, str):
            continue
        name, at = first.setdefault(found.value.casefold(), (found.value, found.at))
        if at == found.at:
            continue
        message = f"the task {quote_text(name)} is already defined {at}"
        if name != found.value:
            message = f"{quote_text(found.value)} differs only in case from the task {quote_text(name)} {at}"
        problems.add(found.at, message, "give each task a unique id")


def check_needs(root: Node, problems: Problems) -> None:
    """Report needs that are unknown, duplicate, the task itself, or part of a cycle."""
    edges: dict[str, dict[str, Position]] = {}
    nameless = not _all_are_mappings(root)
    for _, task in iter_task_nodes(root):
        if isinstance(task.value.get("id"), str):
            edges[task.value["id"]] = {}
        else:
            nameless = True
    # A need may refer to a task with an invalid id.
    known = edges if not nameless else None
    for _, task in iter_task_nodes(root):
        _check_needs_of(task, edges, known, problems)
    for cycle in find_cycles(edges):
        _note_cycle(cycle, edges, problems)


def _check_needs_of(
    task: Node, edges: Mapping[str, dict[str, Position]], known: Collection[str] | None, problems: Problems
) -> None:
    name = task.value.get("id")
    named: set[str] = set()
    for need in _needs(task):
        if need.value in named:
            problems.add(need.at, f"{quote_text(need.value)} is listed twice", "list it once")
        elif need.value == name:
            problems.add(need.at, f"the task {quote_text(need.value)} needs itself", "remove it from its needs")
        elif need.value in edges:
            if isinstance(name, str):
                edges[name].setdefault(need.value, need.at)
        elif known is not None:
            problems.add(need.at, f"there is no task {quote_text(need.value)}", suggest(need.value, known, "the tasks"))
        named.add(need.value)


def _needs(task: Node) -> Iterator[Node]:
    """Yield the ids of the needed tasks."""
    for need in iter_items(task.get("needs")):
        name = need.get("task") if isinstance(need.value, dict) else need
        if name is not None and isinstance(name.value, str):
            yield name


def _all_are_mappings(root: Node) -> bool:
    tasks = root.get("tasks")
    return tasks is not None and isinstance(tasks.value, list) and all(isinstance(task, dict) for task in tasks.value)


def _note_cycle(cycle: list[str], edges: Mapping[str, Mapping[str, Position]], problems: Problems) -> None:
    steps = zip(cycle, [*cycle[1:], cycle[0]], strict=True)
    at, begin = min((edges[task][need], index) for index, (task, need) in enumerate(steps))
    named = [*cycle[begin:], *cycle[:begin], cycle[begin]]
    if len(named) > _MOST_NAMED:
        named = [*named[: _MOST_NAMED - 2], f"… ({len(cycle)} tasks)", named[-1]]
    problems.add(at, f"dependency cycle: {' -> '.join(named)}", "remove one of these needs")


def _check_commands(root: Node, problems: Problems) -> None:
    """Report secret keys in worktree commands, which are recorded."""
    steps = iter_items(root.get("worktrees", "setup"))
    commands = [step.get("run") or step for step in steps]
    for key in ("before_run", "after_run", "teardown"):
        commands += iter_items(root.get("worktrees", key))
    for command in commands:
        if isinstance(command.value, str):
            reject_secret(command, command.value, "command", "`env` of `worktrees`", problems)


def _check_mcp_servers(root: Node, problems: Problems) -> None:
    """Report servers without exactly one of command and URL, and recorded secrets."""
    servers = root.get("mcp_servers")
    if servers is not None and MCP_SERVER_NAME in servers.keys:
        message = f"{MCP_SERVER_NAME!r} is reserved for the built-in server"
        problems.add(servers.keys[MCP_SERVER_NAME], message, "choose another name")
    for server in servers.children.values() if servers is not None else ():
        command, url = server.get("command"), server.get("url")
        if isinstance(server.value, dict) and (command is None) == (url is None):
            message = (
                "the server has neither command nor url" if command is None else "the server has both command and url"
            )
            problems.add(server.at, message, "add `command:` or `url:`" if command is None else "keep one of the two")
        for item in (*iter_items(command), *([] if url is None else [url])):
            if isinstance(item.value, str):
                reject_secret(item, item.value, "server", "its `env`", problems)


def reject_secret(node: Node, text: str, message: str, env: str, problems: Problems) -> None:
    """Report an apparent secret in recorded text; `env` is the key to use instead."""
    if has_secret_key(text):
        remedy = f"remove the key, and pass a variable by name under {env}"
        problems.add(node.at, f"the {message} seems to contain a secret key, and {message}s are recorded", remedy)


def _refuse_key_in_prompt(node: Node, prompt: str, problems: Problems) -> None:
    reject_secret(node, prompt, "prompt", "the adapter's `env`", problems)


def read_prompts(root: Node, folder: Path, problems: Problems) -> dict[int, str]:
    """Return the prompt of each task by index, read from its file if specified."""
    prompts: dict[int, str] = {}
    read = functools.cache(read_prompt)
    for index, task in iter_task_nodes(root):
        prompt, file = task.get("prompt"), task.get("prompt_file")
        if prompt is not None and file is not None:
            problems.add(task.keys["prompt_file"], "the task has both prompt and prompt_file", "keep one of the two")
        elif prompt is not None:
            if isinstance(prompt.value, str):
                prompts[index] = prompt.value
                _refuse_key_in_prompt(prompt, prompt.value, problems)
        elif file is None:
            problems.add(task.at, "the task has neither prompt nor prompt_file", "add `prompt:` here")
        elif isinstance(file.value, str) and file.value:
            try:
                prompts[index] = read(folder / file.value)
                _refuse_key_in_prompt(file, prompts[index], problems)
            except InvalidValue as error:
                problems.add(file.at, error.message, error.remedy)
    return prompts


def check_references(root: Node, folder: Path, problems: Problems) -> None:
    """Report all errors except those in prompts; relative paths start from `folder`."""
    _check_folder(root, folder, problems)
    _check_pull_requests(root, problems)
    for check in (
        _check_required_sections,
        _check_empty_keys,
        check_ids,
        check_needs,
        _check_state,
        _check_coordination,
        _check_network,
        _check_copied_files,
        _check_commands,
        _check_mcp_servers,
    ):
        check(root, problems)
