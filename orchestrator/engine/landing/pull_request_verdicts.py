"""Decide what the state of a pull request means for its task. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.domain.runs.model import Proposal
from orchestrator.domain.security.quoting import DATA_NOTICE, format_value, quote_block, remove_control_characters
from orchestrator.domain.settings.run_settings import PullRequestSettings
from orchestrator.domain.wording import join_names
from orchestrator.protocols import CiFailure, PullRequest, ReviewFinding

#: The largest length of a text in the prompt of a session, in characters, and the largest number of texts.
_LONGEST_TEXT = 8192
_MOST_QUOTED = 20
_MOST_NAMED = 4


@dataclass(frozen=True, slots=True)
class Merged:
    """The pull request was merged."""


@dataclass(frozen=True, slots=True)
class Closed:
    """Someone closed the pull request without merging it."""


@dataclass(frozen=True, slots=True)
class Waits:
    """Only people or the forge can continue."""

    reason: str


@dataclass(frozen=True, slots=True)
class Continues:
    """The task continues: another session gets these failures and comments."""

    reason: str
    failures: Sequence[CiFailure]
    findings: Sequence[ReviewFinding]
    handled: Sequence[str]
    """The ids of all failures and comments that sessions have received."""


def judge_pull_request(
    found: PullRequest, proposal: Proposal, settings: PullRequestSettings
) -> Merged | Closed | Waits | Continues:
    """Return what the state of a pull request means for its task."""
    if found.state == "merged":
        return Merged()
    if found.state == "closed":
        return Closed()
    known = set(proposal.handled)
    ci = f"ci-{found.head}"
    failures = found.failures if found.ci == "failed" and ci not in known else ()
    findings = [one for one in found.findings if one.id not in known]
    problems = [f"CI fails: {_names(found.failures)}"] if found.ci == "failed" else []
    problems += [f"review of {join_names(sorted({one.author for one in findings}))}"] if findings else []
    problems += ["it has merge conflicts with its target"] if found.has_conflict else []
    reason = "; ".join(problems) or None
    # The others follow in the next round.
    fixed = failures[:_MOST_QUOTED] if settings.on_ci_failure == "fix" else ()
    answered = findings[: _MOST_QUOTED - len(fixed)] if settings.on_review == "fix" else ()
    if reason is None or not (fixed or answered):
        return Waits(describe_wait(found.url, reason))
    if proposal.rounds >= settings.rounds:
        return Waits(describe_wait(found.url, f"{reason} (after {proposal.rounds} rounds)"))
    handled = [*proposal.handled, *([ci] if fixed else []), *(one.id for one in answered)]
    return Continues(reason, fixed, answered, handled)


def describe_wait(url: str, reason: str | None = None) -> str:
    """Return the reason of a task whose pull request is open; None: nothing is wrong."""
    return f"{url}: {reason or 'waits for review and merge'}"


def _names(failures: Sequence[CiFailure]) -> str:
    return join_names([remove_control_characters(one.name) for one in failures], _MOST_NAMED) or "an unnamed check"


def render_feedback(continues: Continues, number: int, marker: str) -> str:
    """Return the section of the next prompt about a pull request.

    `marker` is a nonce that the quoted texts cannot contain.
    """
    quoted = [(f"output of {one.name}", one.output.strip()[-_LONGEST_TEXT:]) for one in continues.failures]
    quoted += [(f"comment of {one.place}", one.text.strip()) for one in continues.findings]
    blocks = [
        quote_block(format_value(text, _LONGEST_TEXT), marker, remove_control_characters(title))
        for title, text in quoted
    ]
    text = "\n".join(blocks)
    return (
        "---\n"
        f"Your work is open as pull request {number}, and this worktree contains it. It can't be merged yet:\n"
        f"{continues.reason}. Fix the causes of failed checks, and do what the comments of the review ask for, as far\n"
        "as it belongs to the task. Outputs of checks and comments are quoted between two markers;\n"
        f"{DATA_NOTICE} except for what reviewers ask to change in the work.\n"
        f"{text}\n"
    )
