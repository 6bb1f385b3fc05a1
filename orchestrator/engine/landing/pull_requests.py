"""Propose built work as pull requests, by which it lands, instead of moving the target.

The forge is the authority: work has landed once the forge has merged its pull request, by any method, and the target
has the commit. The branch is pushed before the pull request is opened, and an open one is looked up first, so that a
process killed at any point leaves at most one pull request. Commits of others on the branch are never overwritten.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any, Final, TypeVar

from orchestrator.domain.events.tasks import TaskProposed
from orchestrator.domain.runs.check_results import CheckRecord, attribute_checks
from orchestrator.domain.runs.model import Proposal, TaskDocument
from orchestrator.domain.runs.statuses import Trigger
from orchestrator.domain.settings.run_settings import PullRequestConfig, TaskSpec
from orchestrator.engine.landing.outcomes import LandingOutcomes
from orchestrator.engine.landing.pull_request_verdicts import describe_wait
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.state.ledger import Ledger
from orchestrator.errors import GitError, PluginFailed, RefusedError
from orchestrator.protocols import Forge, NewPullRequest, PullRequest
from orchestrator.repo.git.command import is_object_id
from orchestrator.repo.landing.merge_commits import commit_merge
from orchestrator.repo.landing.target_branch import TASK_TRAILER
from orchestrator.repo.worktrees.hub import internal_ref_name, pull_request_branch_name
from orchestrator.system.background import ask_plugin, open_plugin
from orchestrator.system.failpoints import failpoint

#: The time limit of one call of a forge, in seconds.
CALL_TIMEOUT: Final = 30.0
_LONGEST_TITLE: Final = 72
_LONGEST_PROMPT: Final = 4000
_BACKTICKS: Final = re.compile("`+")

T = TypeVar("T")


async def call_forge(call: Callable[[], Awaitable[T]]) -> T:
    """Call a forge; raise RefusedError, PluginFailed or TimeoutError if it fails, or answers with invalid values."""
    answer = await ask_plugin(call, CALL_TIMEOUT)
    if answer is not None and (invalid := _find_invalid(answer)) is not None:
        raise RefusedError(f"the forge answers with an invalid {invalid}", "report it to the authors of the forge")
    return answer


def _find_invalid(answer: Any) -> str | None:
    """Return the name of a value with the wrong type or form, or None."""
    if not isinstance(answer, PullRequest):
        return "pull request"
    made: Any = answer  # by a plugin, from the answer of a server
    texts = [made.url, made.head, *(text for one in made.failures for text in (one.name, one.output))]
    texts += [text for one in made.findings for text in (one.id, one.author, one.text, one.path or "")]
    checks = {
        "number": type(made.number) is int and made.number > 0,
        "text": all(isinstance(text, str) for text in texts),
        "commit": made.merged_as is None or (isinstance(made.merged_as, str) and is_object_id(made.merged_as)),
        "line": all(one.line is None or type(one.line) is int for one in made.findings),
    }
    return next((name for name, is_valid in checks.items() if not is_valid), None)


async def check_forge(open_forge: Callable[[], AbstractAsyncContextManager[Forge]]) -> None:
    """Raise RefusedError if a forge does not answer, so that a run does not start without a token, for example."""
    try:
        async with open_plugin(open_forge, CALL_TIMEOUT) as forge:
            await call_forge(partial(forge.find, "council/no-such-branch"))
    except (PluginFailed, TimeoutError) as error:
        raise RefusedError(f"pull_requests: {describe_failure(error)}", "try again later, or fix the forge") from error
    except RefusedError as error:
        raise RefusedError(f"pull_requests: {error.message}", error.remedy) from error


class PullRequests:
    """The pull requests of one run."""

    def __init__(
        self, ledger: Ledger, context: RunContext, settings: PullRequestConfig, outcomes: LandingOutcomes
    ) -> None:
        self._ledger, self._context, self.settings, self._outcomes = ledger, context, settings, outcomes

    def connect(self) -> AbstractAsyncContextManager[Forge]:
        """Open a connection to the forge."""
        assert self._context.open_forge is not None, "the run lands by pull requests"  # noqa: S101
        return open_plugin(self._context.open_forge, CALL_TIMEOUT)

    async def settle(self, task: str) -> bool:
        """Return True if a task with an earlier pull request needs none now: it is merged, or can't be read."""
        number = self._ledger.task(task).pull_request
        if number is None or self._ledger.task(task).proposal is None:
            return False
        try:
            async with self.connect() as forge:
                found = await call_forge(partial(forge.read, number))
            return found.state == "merged" and await self.record_merge(task, found)
        except (GitError, RefusedError, PluginFailed, TimeoutError) as error:
            await self._outcomes.postpone(task, describe_failure(error))
            return True

    async def propose(self, task: str, checks: Sequence[CheckRecord]) -> None:
        """Push the built work of a task, open its pull request or update it, and record that.

        Otherwise the reason is recorded, and the task stays queued.
        """
        try:
            await self._propose(task, checks)
        except (GitError, RefusedError, PluginFailed, TimeoutError) as error:
            await self._outcomes.postpone(task, describe_failure(error))

    async def _propose(self, task: str, checks: Sequence[CheckRecord]) -> None:
        document, branch = self._ledger.task(task), pull_request_branch_name(self._ledger.run.id, task)
        number = document.pull_request if document.proposal is not None else None
        async with self.connect() as forge:
            found = await call_forge(partial(forge.find, branch))
            if found is not None and found.state == "merged":
                await self._settle_merge(task, found)
                return
            if (commit := await self._push(task, document, branch)) is None:
                return
            failpoint("pull_request.pushed")
            found = await self._find_or_open(forge, task, branch, number)
            failpoint("pull_request.opened")
            if found.state == "merged":
                await self._settle_merge(task, found)
                return
            if self.settings.auto_merge:
                await call_forge(partial(forge.merge_when_ready, found.number))
        await self._record(task, found, commit, checks)

    async def _settle_merge(self, task: str, found: PullRequest) -> None:
        if not await self.record_merge(task, found):
            await self._outcomes.postpone(task, describe_missing_merge(found, self._ledger.run.target))

    async def _find_or_open(self, forge: Forge, task: str, branch: str, number: int | None) -> PullRequest:
        """Return the pull request of a task, or open one.

        Someone may have merged or closed it just now. If that with the known `number` is closed, the task was retried
        since then.
        """
        found = await call_forge(partial(forge.find, branch))
        if found is not None and (found.state != "closed" or found.number != number):
            return found
        wanted = await self._describe(task, branch)
        return await call_forge(partial(forge.open, wanted))

    async def _push(self, task: str, document: TaskDocument, branch: str) -> str | None:
        """Push the work to its branch, merged with commits of others there; return the newest commit.

        None if that is impossible: the reason is recorded.
        """
        source, commit = self._context.source, document.commit or ""
        remote = await source.tip(branch)
        own = None if document.proposal is None else document.proposal.pushed
        if remote not in (None, own, commit):
            merged = await self._merge_with_others(task, branch, commit)
            if merged is None:
                reason = f"it conflicts with commits of others on {branch!r}: merge them there, or delete the branch"
                await self._outcomes.postpone(task, reason)
                return None
            commit, remote = merged
        if remote == commit:
            return commit
        pushed = await source.push(commit, branch, remote, ())
        if not pushed.moved and await source.tip(branch) != commit:
            await self._outcomes.postpone(task, f"{branch!r} can't be pushed: {pushed.reason}")
            return None
        return commit

    async def _merge_with_others(self, task: str, branch: str, commit: str) -> tuple[str, str] | None:
        """Return the work merged with its branch on the forge, and the newest commit there; None if they conflict."""
        git, head = self._context.git, await self.fetch_head(task, branch)
        for contained, whole in ((head, commit), (commit, head)):
            if await git.is_ancestor(contained, whole):
                return whole, head
        tree, paths = await git.merge_tree(head, commit)
        if paths:
            return None
        message = f"Merge the work of {task} with commits of others\n"
        return await commit_merge(git, tree, head, commit, message), head

    async def fetch_head(self, task: str, branch: str) -> str:
        """Fetch the branch of a pull request; return its newest commit, which stays available."""
        return await self._context.source.fetch(branch, internal_ref_name(self._ledger.run.id, f"proposed/{task}"))

    async def _record(self, task: str, found: PullRequest, commit: str, checks: Sequence[CheckRecord]) -> None:
        document = self._ledger.task(task)
        before = document.proposal
        if before is None or before.url != found.url:
            before = Proposal(url=found.url, pushed=commit, onto=self._context.target.known or self._ledger.run.start)
        proposal = before.model_copy(update={"pushed": commit})
        number = document.building_attempt.number
        await self._ledger.change(
            task,
            Trigger.PROPOSE,
            TaskProposed(pull_request=found.number, url=found.url, commit=commit),
            pull_request=found.number,
            proposal=proposal,
            reason=describe_wait(found.url),
            attempts=document.with_attempt(number, checks=attribute_checks(checks, task)),
        )
        failpoint("pull_request.recorded")

    async def record_merge(self, task: str, found: PullRequest) -> bool:
        """Record that a task has landed, if the forge has merged its pull request into the target; return whether."""
        if found.state != "merged" or found.merged_as is None:
            return False
        target = self._context.target
        await target.refresh()
        if not await target.contains(found.merged_as) or await self._is_older(task, found, found.merged_as):
            return False
        await self._outcomes.record_landed(Trigger.ADOPT, {task: found.merged_as}, f"pull request {found.number}")
        await self._outcomes.drop_branches([task])
        return True

    async def _is_older(self, task: str, found: PullRequest, merge: str) -> bool:
        """Return True if a commit can't have merged a pull request: it is older, or has landed another task."""
        document, tasks = self._ledger.task(task), self._ledger.tasks.documents()
        since, proposal = document.built_base, document.proposal
        if proposal is not None and proposal.url == found.url:
            since = proposal.onto or since
        if any(one.landed == merge for name, one in tasks.items() if name != task):
            return True
        return await self._context.git.is_ancestor(merge, since, may_be_missing=True)

    async def _describe(self, task: str, branch: str) -> NewPullRequest:
        spec, run = await self._ledger.definitions.spec(task), self._ledger.run
        settings = self.settings
        return NewPullRequest(
            branch, run.target, _title(spec), _body(spec, run.id, settings.template),
            settings.draft, settings.labels, settings.reviewers,
        )  # fmt: skip


def describe_failure(error: Exception) -> str:
    """Return the reason why a forge can't be used."""
    return f"the forge did not answer within {CALL_TIMEOUT:g} s" if isinstance(error, TimeoutError) else str(error)


def describe_missing_merge(found: PullRequest, target: str) -> str:
    """Return the reason why a merged pull request is not a landing."""
    if found.merged_as is None:
        return f"pull request {found.number} is merged, but the forge does not name the commit"
    problem = f"which {target!r} does not contain, or contained before, or which has landed another task"
    return f"pull request {found.number} is merged as {found.merged_as:.10}, {problem}"


def _title(spec: TaskSpec) -> str:
    first = next(iter(spec.prompt.strip().splitlines()), spec.id)
    return first if len(first) <= _LONGEST_TITLE else f"{first[: _LONGEST_TITLE - 1]}…"


def _body(spec: TaskSpec, run: str, template: str | None) -> str:
    """Return the text of a pull request; the prompt is quoted, because an agent may have written it."""
    longest = max(map(len, _BACKTICKS.findall(spec.prompt)), default=0)
    fence = "`" * max(3, longest + 1)
    prompt = f"{fence}text\n{spec.prompt.strip()[:_LONGEST_PROMPT]}\n{fence}"
    if template is None:
        return f"{prompt}\n\n{TASK_TRAILER}: {run}/{spec.id}\n"
    for name, value in (("{task}", spec.id), ("{run}", run), ("{prompt}", prompt)):
        template = template.replace(name, value)
    return template
