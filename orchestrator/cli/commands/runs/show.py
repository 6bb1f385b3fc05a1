"""The command that shows a task in full."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from itertools import zip_longest

import click

from orchestrator.api.council import Council
from orchestrator.cli.core.command import CouncilContext, council_command, run_option
from orchestrator.cli.core.completion import complete_tasks
from orchestrator.cli.render.next_steps import Step, format_saved, halt_steps, run_step, task_steps
from orchestrator.cli.render.result import format_state, format_visit
from orchestrator.cli.render.text import (
    described,
    format_age,
    format_count,
    format_elapsed,
    one_line,
    printable,
    truncate_end,
    wrapped,
)
from orchestrator.domain.events.tasks import salvage_name
from orchestrator.domain.runs.check_results import CheckOutcome, CheckRecord, CheckSource
from orchestrator.domain.runs.phases import InputSummary, PhaseStatus
from orchestrator.domain.runs.statuses import LANDING_STATUSES, TaskStatus
from orchestrator.domain.runs.usage import Usage
from orchestrator.domain.wording import format_cost, join_names
from orchestrator.engine.reports.task_details import (
    AttemptDetails,
    HandoffDetails,
    PhaseVisitDetails,
    TaskDetails,
)
from orchestrator.errors import RefusedError
from orchestrator.system.clock import format_local_time


@click.command()
@click.argument("task", shell_complete=complete_tasks)
@run_option
@council_command(is_short_lived=True)
async def show(context: CouncilContext, task: str, run: str | None) -> None:
    """Show a task in full: phases, sessions, handoffs, cost, landing.

    Includes the inputs of each phase and the omitted values, findings, tokens and time, and the latest activity of a
    running task. Handoffs are shortened; --json prints them in full.

    \b
    Examples:
      council show models
      council show models --run 20260102-030405-ab12 --json
    """
    details = await context.council.tasks.details(task, run)
    if context.output.as_json:
        context.output.json({**details.to_json(), "exit": 0})
        return
    state, steps = await _state_and_steps(context.council, details)
    for line in (*task_detail_lines(details, time.time(), state), *steps):
        context.output.text(f"{line}\n")


async def _state_and_steps(council: Council, details: TaskDetails) -> tuple[str, Sequence[str]]:
    """Return the label of a task's status, and the next commands as lines."""
    try:
        report = await council.runs.status(details.run)
    except RefusedError:  # its repositories are gone
        return details.status.replace("_", " "), ()
    shown = next(one for one in report.tasks if one.id == details.id)
    steps = task_steps(shown, report, is_newest=await council.runs.newest() == details.run, is_shown=True)
    if not steps and shown.status != TaskStatus.LANDED:
        steps = halt_steps(report) or [Step("next", own)] if (own := run_step(report)) else ()
    return format_state(details.status, report), [printable(str(step)) for step in steps]


#: The number of characters shown of a digest or commit.
_SHORT_DIGEST = 10
#: The maximum characters of a handoff and of a prompt.
_LONGEST = 200
#: The maximum number of listed paths and findings.
_MAX_NAMED = 10


def task_detail_lines(details: TaskDetails, now: float, state: str) -> Iterator[str]:
    """Yield a task in full: phases, sessions, handoffs, landing and usage."""
    yield from _wrapped(f"task {details.id} of run {details.run}: {state}", "")
    yield from described(list(_head(details, now)), "  ")
    if details.phases or details.remaining_phases:
        yield "phases"
    for visit in details.phases:
        yield from _visit(visit, details)
    yield from (printable(f"  {name}: pending") for name in details.remaining_phases)
    if details.sessions:
        yield "sessions"
    for session in details.sessions:
        yield from _session(session)
    yield from _checks(details)
    if details.messages:
        yield "messages"
    for message in details.messages:
        receivers = f"session {message.attempts[0]}" if message.attempts else "not received yet"
        yield from _wrapped(f"{format_local_time(message.time)}, {receivers}: {one_line(message.text, _LONGEST)}")
    if details.handoffs:
        yield "handoffs"
        rejected = {visit.handoff for visit in details.phases if visit.status == PhaseStatus.REJECTED}
        for handoff in details.handoffs:
            is_complete = details.status in {TaskStatus.LANDED, TaskStatus.DONE}
            unread = "never: no later phase needs it" if is_complete else "not yet"
            missing = "never: a user rejected it" if handoff.id in rejected else unread
            yield from _handoff(handoff, missing)
    yield "landing"
    yield from _wrapped(_landing(details))
    if details.sessions:
        yield "usage"
        yield from _wrapped(_figures(details.usage))


def _wrapped(text: str, head: str = "  ") -> Iterator[str]:
    return wrapped(printable(text), head=head, indent="    ")


def _head(details: TaskDetails, now: float) -> Iterator[list[str]]:
    yield from _prompt(details)
    fields = {
        "plan of": "" if details.plan is None else details.plan.removeprefix(f"{details.run}/"),
        "workflow": details.workflow or "",
        "expanded to": ", ".join(details.subtasks),
        "adapter": details.adapter or "",
        "attempts": str(details.attempts),
        "needs": ", ".join(f"{one} (built)" if one in details.built_needs else one for one in details.needs),
        "reason": one_line(details.reason or ""),
        "activity": ""
        if details.latest_activity is None
        else f"{one_line(details.latest_activity.text)} ({format_age(details.latest_activity.time, now)})",
        "damage": "; ".join(details.damage),
    }
    yield from ([name, value] for name, value in fields.items() if value)


def _prompt(details: TaskDetails) -> Iterator[list[str]]:
    source = [] if details.tracker is None else [f"(from {details.tracker})"]
    lines = [*map(str.rstrip, (details.prompt or "").strip().splitlines()), *source]
    more = len(lines) - _MAX_NAMED
    shown = lines if more <= 0 else [*lines[:_MAX_NAMED], f"… ({more} more lines; --json prints all)"]
    for name, line in zip_longest(["prompt"], shown, fillvalue=""):
        if shown:
            yield [name, truncate_end(line, _LONGEST)]


def _visit(visit: PhaseVisitDetails, details: TaskDetails) -> Iterator[str]:
    again = f" (visit {visit.visit})" if visit.visit > 1 else ""
    ended = {one.number for one in details.sessions if one.ended is not None}
    is_pending = visit.status == PhaseStatus.IN_PROGRESS and visit.attempts and ended.issuperset(visit.attempts)
    did = ["pending" if is_pending else format_visit(visit.status)]
    if details.status == TaskStatus.NO_CHANGE and visit is details.phases[-1]:
        did = [TaskStatus.NO_CHANGE.record.label]
    if visit.verdict is not None:
        did.append(f"verdict: {visit.verdict}")
    if visit.usage.sessions:
        did += [_figures(visit.usage), " then ".join(visit.adapters)]
    yield from _wrapped(f"{visit.phase}{again}: {', '.join(did)}")
    yield from described(list(_details(visit, details)), "    ")


def _details(visit: PhaseVisitDetails, details: TaskDetails) -> Iterator[list[str]]:
    times = [format_local_time(one) for one in (visit.started, visit.ended) if one is not None]
    fields = {
        "time": " to ".join(times) if visit.usage.sessions else "",
        "sessions": ", ".join(map(str, visit.attempts)),
        "inputs": "" if visit.inputs is None else _inputs(visit.inputs),
        "received": ", ".join(_named(one, details) for one in visit.received),
        "handoff": "" if visit.handoff is None else _named(visit.handoff, details),
        "commit": "" if visit.commit is None else visit.commit[:_SHORT_DIGEST],
        "rounds": str(visit.rounds or ""),
        "repairs": str(visit.repairs or ""),
        "note": one_line(visit.note or ""),
        "reason": one_line(visit.reason or ""),
        "discarded": _format_paths(visit.discarded),
    }
    yield from ([name, value] for name, value in fields.items() if value)
    for one in visit.findings[:_MAX_NAMED]:
        place = ":".join(str(part) for part in (one.get("path"), one.get("line")) if part)
        parts = filter(None, [place, f"({one.get('severity')})", str(one.get("message") or "")])
        yield ["finding", one_line(" ".join(parts))]
    if len(visit.findings) > _MAX_NAMED:
        yield ["finding", f"and {len(visit.findings) - _MAX_NAMED} more"]


def _inputs(inputs: InputSummary) -> str:
    """Return the inputs of a phase, their share of all values, and the omissions."""
    if not inputs.keys and not inputs.omitted:
        return "none"
    names = ", ".join(inputs.keys) or "none"
    left = f"; omitted: {', '.join(inputs.omitted)}" if inputs.omitted else ""
    return f"{names} ({inputs.size:,} of {inputs.total_size:,} bytes{left})"


def _named(handoff: str, details: TaskDetails) -> str:
    """Return the kind and source of the handoff with an id."""
    found = next((one for one in details.handoffs if one.id == handoff), None)
    if found is None:
        return handoff
    source = "" if found.kind == found.phase else f" of {found.phase}"
    return f"{found.kind}{source} (session {found.attempt})"


def _session(one: AttemptDetails) -> Iterator[str]:
    parts = [(one.outcome or "").replace("_", " ") or ("running" if one.ended is None else "ended"), one.adapter]
    if one.model is not None:
        parts.append(one.model)
    parts += [format_elapsed(one.seconds), *_used(one.input_tokens, one.output_tokens, one.cost)]
    if one.is_estimated:
        parts.append("estimated")
    if one.resumed:
        parts.append("continued an earlier conversation" + (", with a user" if one.attached else ""))
    yield from _wrapped(f"{one.number} {one.phase}: {', '.join(parts)}")
    fields = {
        "restart": one_line(one.restart_reason),
        "reason": one_line(one.reason or ""),
        "message": one_line(one.last_message or "", _LONGEST),
        "saved as": "" if one.branch is None else salvage_name(one.branch),
        "log": one.log or "",
        "check": one.check_log or "",
        "discarded": _format_paths(one.discarded),
        "denied": one_line(str(one.denied_tools)),
    }
    yield from described([[name, value] for name, value in fields.items() if value], "    ")


def _checks(details: TaskDetails) -> Iterator[str]:
    if any(session.checks for session in details.sessions):
        yield "checks"
    for session in details.sessions:
        for check in session.checks:
            yield from _check(session, check, details)


def _check(session: AttemptDetails, check: CheckRecord, details: TaskDetails) -> Iterator[str]:
    """Yield the result of a check, and its source."""
    outcome = check.outcome.upper() if check.outcome is CheckOutcome.FLAKY else str(check.outcome)
    yield printable(f"  session {session.number}: {outcome}: {one_line(check.command)}")
    if check.outcome is CheckOutcome.SKIPPED:
        yield from described([["reason", f"it changes none of {', '.join(map(one_line, check.paths))}"]], "    ")
        return
    source = {CheckSource.CACHE: "cached: ", CheckSource.JOINED: "joined: "}.get(check.source, "")
    owner = f" for {check.task}" if check.task != details.id else ""
    run = f" of run {check.run}" if check.run != details.run else ""
    ran = f"{source}ran{owner}{run} on {check.host} in {check.seconds:.1f} s, until {format_local_time(check.ended)}"
    tests = join_names([one_line(name) for name in check.failed_tests], _MAX_NAMED)
    fields = {"run": ran, "tests failed": tests, "failed": check.failed_log or "", "log": check.log}
    yield from described([[name, value] for name, value in fields.items() if value], "    ")


def _handoff(one: HandoffDetails, missing: str) -> Iterator[str]:
    """Yield the lines of a handoff; `missing` replaces its receipts if it has none."""
    where = f"from {one.phase}" if one.to is None else f"{one.phase} to {one.to}"
    state = "intact" if one.is_intact else "DAMAGED: the data does not match the digest"
    parts = [where, one.protocol, f"via {one.via}", f"{one.digest[: _SHORT_DIGEST + len('sha256:')]}, {state}"]
    if one.key is not None:
        parts.append(f"shared as {one.key}, version {one.version}")
    yield from _wrapped(f"{one.id}, {one.kind}: {'; '.join(parts)}")
    received = ", ".join(f"{receipt.phase} (session {receipt.attempt})" for receipt in one.receipts)
    taken = [["received", received or missing]] if received or one.to is not None else []
    yield from described([*taken, ["data", _short(one.data)]], "    ")
    if one.mediation is not None:
        how = one.mediation.transformation or "default"
        yield from described([["mediated", f"by {how}"], ["result", _short(one.mediation.processed)]], "    ")


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text):,} characters; --json prints all)"


def _landing(details: TaskDetails) -> str:
    one = details.landing
    request = "" if details.pull_request is None else f", pull request {details.pull_request}"
    kept = format_saved(details)
    if details.landed is not None:
        when = "" if one.time is None else f", {format_local_time(one.time)}"
        return f"landed as {details.landed[:_SHORT_DIGEST]} on {one.target}{when}{request}"
    if details.paths:
        conflict = f"conflicts with {one.target} in {_format_paths(details.paths)}"
        return f"{'; '.join(filter(None, [conflict, kept]))}{request}"
    if one.waiting is not None and details.status in LANDING_STATUSES:
        return f"{one.waiting[:_SHORT_DIGEST]}, built by session {one.attempt}, queued to land on {one.target}{request}"
    return f"not landed; its work is {kept}{request}" if kept else f"not landed{request}"


def _figures(one: Usage) -> str:
    sessions = f"{one.sessions} {'session' if one.sessions == 1 else 'sessions'}"
    return ", ".join([sessions, format_elapsed(one.seconds), *_used(one.input_tokens, one.output_tokens, one.cost)])


def _used(tokens_in: int, tokens_out: int, cost: float | None) -> list[str]:
    parts = [f"{format_count(tokens_in + tokens_out)} tokens"] if tokens_in or tokens_out else []
    return parts if cost is None else [*parts, format_cost(cost)]


def _format_paths(paths: Sequence[str]) -> str:
    return join_names(paths, _MAX_NAMED)
