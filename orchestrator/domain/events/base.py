"""The base of all events, and their registry.

An event is a frozen class: its `type`, typed fields, and the sentence that users read. The record of it
(`protocols.Event`), the JSON output, its schema and docs/events.md are derived from the class. Importing this package
must stay cheap, because most commands do: a dataclass or a model for each event would take over 100 ms.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from enum import Enum, auto
from typing import Any, ClassVar, Final, Self, dataclass_transform

#: All events by type.
EVENT_TYPES: Final[dict[str, type[TypedEvent]]] = {}
#: The base of all events whose type has a prefix.
_BASES_BY_PREFIX: Final[dict[str, type[TypedEvent]]] = {}


class Shown(Enum):
    """The visibility of an event in the progress of a run."""

    ALWAYS = auto()  #: as a line, also above the live table
    LINES = auto()  #: as a line, but not above the live table: the table itself shows it
    NEVER = auto()  #: it is recorded only


@dataclass_transform(kw_only_default=True, frozen_default=True)
class TypedEvent:
    """Base of all events: fields are annotations, optional ones have a default.

    The data of an event are the fields that were given, so a field with a default is absent unless it was given.
    """

    type: ClassVar[str]
    """Its name, such as `run.created`."""
    sentence: ClassVar[str]
    """The text that users read: a template with the names of fields and properties."""
    sentence_without: ClassVar[tuple[str, str] | None] = None
    """A field, and the sentence if that is empty."""
    shown: ClassVar[Shown] = Shown.ALWAYS
    """Its visibility in the progress of a run."""
    context: ClassVar[tuple[str, ...]] = ()
    """Fields that the recorder may fill in, and that must be given in the end."""
    field_types: ClassVar[Mapping[str, str]] = {}
    """The annotations of its fields by name, in the order of the data."""

    def __init_subclass__(cls, *, is_base: bool = False, prefix: str | None = None) -> None:
        """Register an event, or with `is_base` the base of all types with its `prefix`.

        Raises TypeError for an incomplete event.
        """
        annotations: Mapping[str, str] = cls.__dict__.get("__annotations__", {})  # noqa: RUF063  that needs `inspect`
        own = {name: kind for name, kind in annotations.items() if "ClassVar" not in kind}
        cls.field_types = {**cls.field_types, **own}
        if reserved := own.keys() & _RESERVED_NAMES:
            raise TypeError(f"{cls.__name__}: rename its field {min(reserved)!r}, the name has another meaning")
        if not is_base:
            _register(cls)
        elif prefix is not None:
            _BASES_BY_PREFIX[prefix] = cls

    def __init__(self, **fields: Any) -> None:
        known = self.field_types
        unknown = fields.keys() - known.keys()
        missing = [name for name in known if name not in fields and not hasattr(type(self), name)]
        if unknown or missing:
            raise TypeError(f"{type(self).__name__}: unknown fields {sorted(unknown)}, missing fields {missing}")
        self.__dict__.update(fields)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.__dict__ == self.__dict__

    __hash__ = None  # type: ignore[assignment]  # fields may be lists

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"

    def replace(self, **fields: Any) -> Self:
        """Return the event with other values of some fields."""
        return type(self)(**{**self.__dict__, **fields})

    def within(self, **context: Any) -> Self:
        """Return the event, with its missing fields filled in from `context`."""
        return type(self)(
            **{**{name: one for name, one in context.items() if name in self.field_types}, **self.__dict__}
        )

    def data(self) -> dict[str, Any]:
        """Return the fields that were given, as JSON values."""
        given = self.__dict__
        return {name: _to_json(given[name]) for name in self.field_types if name in given}

    def check_context(self) -> None:
        """Raise TypeError if a field that the recorder fills in is missing."""
        for name in self.context:
            if name not in self.__dict__:
                raise TypeError(f"{type(self).__name__}: record it with its {name!r}")

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Self | None:
        """Return the event that was recorded with this data; None if it lacks a field."""
        try:
            return cls(**{name: data[name] for name in cls.field_types if name in data})
        except TypeError:
            return None

    def choose_sentence(self) -> str:
        """Return the template of the sentence for these fields."""
        if self.sentence_without is None or getattr(self, self.sentence_without[0]):
            return self.sentence
        return self.sentence_without[1]


#: Attributes of the class, and fields of the JSON output, that no field may replace.
_RESERVED_NAMES: Final = frozenset({*TypedEvent.__dict__, "event", "position", "time"})


def template_names(template: str) -> Iterator[str]:
    """Yield the fields and properties that a sentence names."""
    return (name for _, name, _, _ in string.Formatter().parse(template) if name)


def _register(cls: type[TypedEvent]) -> None:
    if "type" not in cls.__dict__:
        raise TypeError(f"{cls.__name__}: give it a `type`, or declare it a base of events by `is_base=True`")
    if not cls.__doc__:
        raise TypeError(f"{cls.__name__}: give it a docstring, docs/events.md shows it")
    base = _BASES_BY_PREFIX.get(cls.type.partition(".")[0], TypedEvent)
    if not issubclass(cls, base):
        raise TypeError(f"{cls.__name__}: derive it from {base.__name__}, the base of all types like {cls.type!r}")
    if not cls.__dict__.get("sentence"):
        raise TypeError(f"{cls.__name__}: give it a `sentence`")
    if cls.type in EVENT_TYPES:
        raise TypeError(f"{cls.__name__}: its type {cls.type!r} is that of {EVENT_TYPES[cls.type].__name__}")
    field, other = cls.sentence_without or ("", "")
    for name in (*filter(None, (field,)), *template_names(cls.sentence), *template_names(other)):
        if name not in cls.field_types and not isinstance(getattr(cls, name, None), property):
            raise TypeError(f"{cls.__name__}: its sentence names {name!r}, which is neither a field nor a property")
    EVENT_TYPES[cls.type] = cls


def _to_json(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_to_json(item) for item in value]
    return value


class RunEvent(TypedEvent, is_base=True, prefix="run"):
    """Base of the events of a run."""

    context: ClassVar[tuple[str, ...]] = ("run",)

    run: str = ""
    """Its id; the run's ledger fills it in."""


class TaskEvent(RunEvent, is_base=True, prefix="task"):
    """Base of the events of a task."""

    context = ("run", "task")
    shown = Shown.LINES

    task: str = ""
    """Its name; a recorded transition of the task fills it in."""
    attempt: int | None = None
    """The number of its session, from its first attempt on."""


class AttemptEvent(TaskEvent, is_base=True):
    """Base of the events that may record the end of an attempt."""

    outcome: str = ""
    """`built`, `completed`, `interrupted`, `cancelled`, or the class of the failure."""
    reason: str | None = None
    branch: str | None = None
    """The branch with the work; null if there is no work."""
