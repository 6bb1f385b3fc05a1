"""All events: one frozen class each, with its type, fields and sentence.

Entry point: `EVENT_TYPES`, all classes by type; a class is registered when it is defined. To add an event, add its
class to the module of its topic. Imports nothing.
"""

from orchestrator.domain.events import coordination, phases, runs, state, tasks
from orchestrator.domain.events.base import EVENT_TYPES, Shown, TypedEvent

__all__ = ["EVENT_TYPES", "Shown", "TypedEvent", "coordination", "phases", "runs", "state", "tasks"]
