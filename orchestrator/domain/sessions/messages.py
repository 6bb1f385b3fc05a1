"""Messages of the user to the agents of a task: which of them a session has not received yet."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Final

from pydantic import BaseModel, ConfigDict

from orchestrator.domain.documents.times import Instant
from orchestrator.domain.runs.model import Attempt
from orchestrator.domain.runs.statuses import TaskStatus

#: The statuses in which a task accepts messages: a session of it follows, or runs.
MESSAGE_STATUSES: Final = frozenset({TaskStatus.PENDING, TaskStatus.RUNNING, TaskStatus.AWAITING_APPROVAL})
#: The maximum length of a message in characters, and of all messages of a task.
MAX_MESSAGE_CHARS, MAX_TASK_CHARS = 10_000, 200_000
_HEAD: Final = "The user sent this while the task was in progress; it adds to the task:"


class UserMessage(BaseModel):
    """A message of the user to the agents of a task."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    id: str
    text: str
    time: Instant
    """When it was sent, in wall-clock seconds."""
    attempts: tuple[int, ...] = ()
    """The numbers of the attempts whose sessions have received it."""

    def with_attempt(self, number: int) -> UserMessage:
        """Return the message as received by one more attempt."""
        return self.model_copy(update={"attempts": tuple(dict.fromkeys((*self.attempts, number)))})


def due_messages(messages: Iterable[UserMessage], received_by: Collection[int]) -> list[UserMessage]:
    """Return the messages that no session of a conversation has received, oldest first.

    `received_by` are the numbers of the conversation's attempts. A new conversation gets all messages of its task.
    """
    due = [message for message in messages if not set(received_by) & set(message.attempts)]
    return sorted(due, key=lambda message: (message.time, message.id))


def find_conversation_attempts(attempts: Sequence[Attempt], conversation: str | None) -> list[int]:
    """Return the numbers of the attempts that took part in a conversation."""
    return [one.number for one in attempts if conversation is not None and one.session == conversation]


def render_messages(messages: Sequence[UserMessage]) -> str | None:
    """Return messages as a part of a prompt; None if there are none."""
    return "\n\n".join((_HEAD, *(message.text.strip() for message in messages))) if messages else None
