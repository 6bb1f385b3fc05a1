"""Messages of the user to the agents of a task: which of them a session has not received yet."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from enum import StrEnum
from typing import Final

from pydantic import Field

from orchestrator.domain.documents.stored import StoredDocument
from orchestrator.domain.documents.times import Instant
from orchestrator.domain.runs.model import Attempt
from orchestrator.domain.runs.statuses import TaskStatus

#: The statuses in which a task accepts messages: a session of it follows, or runs.
MESSAGE_STATUSES: Final = frozenset({TaskStatus.PENDING, TaskStatus.RUNNING, TaskStatus.AWAITING_APPROVAL})
#: The maximum length of a message in characters, and of all messages of a task.
MAX_MESSAGE_CHARS, MAX_TASK_CHARS = 10_000, 200_000


class Receiver(StrEnum):
    """The session that receives a message next."""

    SESSION = "session"  #: the running one, after a tool call or when its agent is about to end its turn
    NEXT_SESSION = "next_session"


_HEAD: Final = "The user sent this while the task was in progress; it adds to the task:"


class UserMessage(StoredDocument):
    """A message of the user to the agents of a task."""

    id: str
    text: str
    time: Instant
    """When it was sent, in wall-clock seconds."""
    attempts: tuple[int, ...] = ()
    """The numbers of the attempts whose sessions have received it."""
    version: int = Field(default=0, exclude=True)
    """The version of its document; 0 if it is not stored."""

    def with_attempt(self, number: int) -> UserMessage:
        """Return the message as received by one more attempt."""
        return self.model_copy(update={"attempts": tuple(dict.fromkeys((*self.attempts, number)))})


def due_messages(messages: Iterable[UserMessage], received_by: Collection[int]) -> list[UserMessage]:
    """Return the messages that no session of a conversation has received.

    `received_by` are the numbers of the conversation's attempts. A new conversation gets all messages of its task.
    """
    return [message for message in messages if not set(received_by) & set(message.attempts)]


def find_conversation_attempts(attempts: Sequence[Attempt], conversation: str | None) -> list[int]:
    """Return the numbers of the attempts that took part in a conversation."""
    return [one.number for one in attempts if conversation is not None and one.session == conversation]


def render_messages(messages: Sequence[UserMessage]) -> str | None:
    """Return messages as a part of a prompt; None if there are none."""
    return "\n\n".join((_HEAD, *(message.text.strip() for message in messages))) if messages else None
