"""Convert issues of a forge to tasks. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from orchestrator.protocols import RequestedAction, TrackedTask, TrackerRequest

#: The labels that people set to request something.
IGNORE_LABEL: Final = "council:ignore"
RETRY_LABEL: Final = "council:retry"
_PREFIX: Final = "issue-"
_PRIORITIES: Final = {"high": 10, "medium": 0, "low": -10}
_SETTING_LABEL: Final = re.compile(r"(priority|owns|adapter|workflow)\s*:\s*(\S.*)", re.IGNORECASE)
_FRONT_MATTER: Final = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_TASK_LIST: Final = re.compile(r"^[ \t]*[-*+] \[[ xX]\][ \t]+(?:\S*/\S+/(?:-/)?issues/|#)(\d+)\b", re.MULTILINE)
_BLOCKED_BY: Final = re.compile(
    r"\b(?:blocked by|depends on|needs)[: \t]+((?:#\d+(?:[, \t]+(?:and[ \t]+)?)?)+)", re.IGNORECASE
)
_COMMAND: Final = re.compile(
    r"^/council[ \t]+(retry|cancel|ignore|approve|reject)\b[ \t]*(.*)", re.IGNORECASE | re.DOTALL
)
_ACTIONS: Final[Mapping[str, RequestedAction]] = {
    "retry": "retry", "cancel": "cancel", "ignore": "ignore", "approve": "approve", "reject": "reject"
}  # fmt: skip
_FENCED: Final = re.compile(r"^(```|~~~).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Comment:
    """A comment on an issue."""

    id: int
    author: str
    body: str
    is_trusted: bool
    """Whether the author may write to the repository."""
    is_person: bool = True
    """Whether a person wrote it, and not an app or the forge itself."""


@dataclass(frozen=True, slots=True)
class Issue:
    """An issue of a forge, with what people did to it."""

    number: int
    title: str
    body: str
    is_open: bool
    labels: frozenset[str] = frozenset()
    is_trusted: bool = False
    """Whether the author may write to the repository."""
    blocked_by: tuple[int, ...] = ()
    """The open issues that the forge itself records as blocking it."""
    sub_issues: tuple[int, ...] = ()
    closed: str | None = None
    """The time of its closing."""
    comments: tuple[Comment, ...] = field(default=(), repr=False)
    retry_requests: tuple[str, ...] = ()
    """The ids of the events that set the label `council:retry`."""


def task_id(number: int) -> str:
    """Return the id of an issue's task."""
    return f"{_PREFIX}{number}"


def issue_number(task: str) -> int | None:
    """Return the number of a task's issue, or None if it is not a task of an issue."""
    number = task.removeprefix(_PREFIX)
    return int(number) if task != number and number.isascii() and number.isdigit() else None


def split_front_matter(body: str) -> tuple[Mapping[str, Any], str]:
    """Return the front matter of a body and the rest; no settings if it is not a YAML mapping."""
    found = _FRONT_MATTER.match(body)
    if found is None:
        return {}, body
    try:
        values = yaml.safe_load(found[1])
    except yaml.YAMLError:
        return {}, body
    return (values, body[found.end() :]) if isinstance(values, dict) else ({}, body)


def needed_issues(issue: Issue) -> set[int]:
    """Return the issues that an issue needs: its task list, sub-issues, "blocked by" and what the forge records."""
    text = _FENCED.sub("", issue.body)
    named = {int(number) for number in _TASK_LIST.findall(text)}
    for group in _BLOCKED_BY.findall(text):
        named |= {int(number) for number in re.findall(r"\d+", group)}
    return (named | {*issue.blocked_by, *issue.sub_issues}) - {issue.number}


def to_tasks(issues: Iterable[Issue], open_elsewhere: Collection[int] = ()) -> list[TrackedTask]:
    """Return the tasks of issues, except those that wait for an open issue that is not among them.

    Issues that only closed issues block are free. `open_elsewhere` are the open ones among the needed other issues.
    """
    listed = {issue.number: issue for issue in issues if IGNORE_LABEL not in issue.labels}
    needs = {number: needed_issues(issue) for number, issue in listed.items()}
    left = dict(listed)
    while blocked := [
        one for one in left if any(need in open_elsewhere or need in listed.keys() - left for need in needs[one])
    ]:
        for number in blocked:
            del left[number]
    return [_to_task(issue, sorted(needs[number] & left.keys())) for number, issue in left.items()]


def _to_task(issue: Issue, needs: Sequence[int]) -> TrackedTask:
    settings, text = split_front_matter(issue.body) if issue.is_trusted else ({}, issue.body)
    labels = _label_settings(issue.labels)
    owns = settings.get("owns", [])
    return TrackedTask(
        id=task_id(issue.number),
        prompt=_prompt(issue, text),
        needs=tuple(map(task_id, needs)),
        priority=_priority(_text(settings.get("priority"), labels.get("priority"))),
        owns=(*([owns] if isinstance(owns, str) else map(str, owns)), *labels.get("owns", [])),
        adapter=_text(settings.get("adapter"), labels.get("adapter")),
        workflow=_text(settings.get("workflow"), labels.get("workflow")),
    )


def issue_text(issue: Issue) -> str:
    """Return the title and the text of an issue by someone with write access, with which its prompt begins."""
    return _join(issue, split_front_matter(issue.body)[1])


def _join(issue: Issue, text: str, comments: Iterable[str] = ()) -> str:
    return "\n\n".join(filter(None, (f"#{issue.number} {issue.title}".strip(), text.strip(), *comments)))


def _prompt(issue: Issue, text: str) -> str:
    comments = [
        f"Comment of {comment.author}:\n{comment.body.strip()}"
        for comment in issue.comments
        if comment.is_person and not _COMMAND.match(comment.body.strip())
    ]
    return _join(issue, text, comments)


def _label_settings(labels: Collection[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for label in sorted(labels):
        if (match := _SETTING_LABEL.fullmatch(label)) is not None:
            found.setdefault(match[1].lower(), []).append(match[2])
    return found


def _priority(value: object) -> int | None:
    text = str(value).strip().lower()
    if text in _PRIORITIES:
        return _PRIORITIES[text]
    try:
        return max(-100, min(100, int(text)))
    except ValueError:
        return None


def _text(setting: object, labels: Sequence[str] | None) -> str | None:
    return str(setting) if setting is not None else labels[0] if labels else None


def find_requests(issue: Issue, task: str, *, has_ended: bool) -> list[TrackerRequest]:
    """Return what people with write access requested for an issue's task, oldest first."""
    found = [
        TrackerRequest(f"comment-{comment.id}", task, _ACTIONS[match[1].lower()], match[2].strip() or None)
        for comment in issue.comments
        if comment.is_person and comment.is_trusted and (match := _COMMAND.match(comment.body.strip())) is not None
    ]
    found += [TrackerRequest(f"label-{event}", task, "retry") for event in issue.retry_requests]
    if not issue.is_open and not has_ended:
        found.append(TrackerRequest(f"closed-{issue.number}-{_digits(issue.closed)}", task, "cancel"))
    if IGNORE_LABEL in issue.labels and not has_ended:
        found.append(TrackerRequest(f"ignored-{issue.number}", task, "ignore", f"it has the label {IGNORE_LABEL}"))
    return found


def _digits(time: str | None) -> str:
    return re.sub(r"\D", "", time or "")
