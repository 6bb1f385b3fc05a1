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
REQUEST_LABELS: Final = frozenset({IGNORE_LABEL, RETRY_LABEL})
_PREFIX: Final = "issue-"
_PRIORITIES: Final = {"high": 10, "medium": 0, "low": -10}
_SETTING_LABEL: Final = re.compile(r"(priority|owns|adapter|workflow)\s*:\s*(\S.*)", re.IGNORECASE)
_FRONT_MATTER: Final = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_TASK_LIST: Final = re.compile(r"^[ \t]*[-*+] \[[ xX]\][ \t]+(?:\S*/\S+/(?:-/)?issues/|#)(\d{1,9})\b", re.MULTILINE)
_BLOCKED_BY: Final = re.compile(
    r"\b(?:blocked by|depends on|needs)[: \t]+((?:#\d{1,9}\b(?:[, \t]+(?:and[ \t]+)?)?)+)", re.IGNORECASE
)
_COMMAND: Final = re.compile(
    r"^/council[ \t]+(retry|cancel|ignore|approve|reject)\b[ \t]*(.*)", re.IGNORECASE | re.DOTALL
)
_ACTIONS: Final[Mapping[str, RequestedAction]] = {
    "retry": "retry", "cancel": "cancel", "ignore": "ignore", "approve": "approve", "reject": "reject"
}  # fmt: skip
_FENCES: Final = ("```", "~~~")
#: Of the issues that one text names, only the first ones count.
_MOST_NEEDS: Final = 100


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
    label_events: tuple[tuple[str, str], ...] = ()
    """The events that set a label with which people request something: the label and the id, oldest first."""


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
    except (yaml.YAMLError, ValueError, RecursionError):  # such as the month 13
        return {}, body
    return (values, body[found.end() :]) if isinstance(values, dict) else ({}, body)


def needed_issues(issue: Issue) -> set[int]:
    """Return the issues that an issue needs: its task list, sub-issues, "blocked by" and what the forge records."""
    text = _without_code(issue.body)
    numbers = [*_TASK_LIST.findall(text), *re.findall(r"\d+", " ".join(_BLOCKED_BY.findall(text)))]
    named = set(map(int, numbers[:_MOST_NEEDS]))
    return (named | {*issue.blocked_by, *issue.sub_issues}) - {issue.number}


def _without_code(text: str) -> str:
    """Return a text without fenced code."""
    kept, fence = list[str](), ""
    for line in text.split("\n"):
        begin = line[:3]
        if fence:
            fence = "" if begin == fence and not line[3:].strip() else fence
        elif begin in _FENCES:
            fence = begin
        else:
            kept.append(line)
    return "\n".join(kept)


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
    owns = settings.get("owns")
    own_paths = [owns] if isinstance(owns, str) else owns if isinstance(owns, list) else []
    return TrackedTask(
        id=task_id(issue.number),
        prompt=_prompt(issue, text),
        needs=tuple(map(task_id, needs)),
        priority=_priority(_text(settings.get("priority"), labels.get("priority"))),
        owns=(*(path for path in own_paths if isinstance(path, str)), *labels.get("owns", [])),
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
        TrackerRequest(f"comment-{comment.id}", task, action, match[2].strip() or None)
        for comment in issue.comments
        if comment.is_person
        and comment.is_trusted
        and (match := _COMMAND.match(comment.body.strip())) is not None
        and (action := _ACTIONS.get(match[1].lower())) is not None  # not so for a Turkish İ
    ]
    found += [TrackerRequest(f"label-{event}", task, "retry") for event in retry_events(issue)]
    if not issue.is_open and not has_ended:
        found.append(TrackerRequest(f"closed-{issue.number}-{_digits(issue.closed)}", task, "cancel"))
    if IGNORE_LABEL in issue.labels and not has_ended:
        events = [event for label, event in issue.label_events if label == IGNORE_LABEL]
        newest = "-".join(("ignored", str(issue.number), *events[-1:]))
        found.append(TrackerRequest(newest, task, "ignore", f"it has the label {IGNORE_LABEL}"))
    return found


def retry_events(issue: Issue) -> list[str]:
    """Return the ids of the events that set the label `council:retry`."""
    return [event for label, event in issue.label_events if label == RETRY_LABEL]


def _digits(time: str | None) -> str:
    return re.sub(r"\D", "", time or "")
