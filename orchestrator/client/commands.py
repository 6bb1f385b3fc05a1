"""What a session can ask for: one table, of which commands, tools, help and the check of what comes in are made."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

TEXT = "text"
PATH = "path"
PATHS = "paths"
SECONDS = "seconds"
#: A document's version.
VERSION = "version"
#: Any value of JSON; on a command line other text stands for itself, and `-` for what is on standard input.
VALUE = "value"
#: An object of JSON; on a command line the name of a file that holds it, or else standard input.
OBJECT = "object"
STANDARD_INPUT = "-"

#: The name of our own server of the Model Context Protocol among those of a session.
MCP_SERVER_NAME = "council"

#: Bytes of a request, at most; characters of a text or of a path; how many paths.
MAX_REQUEST_BYTES = (1 << 20) + (1 << 17)
MAX_TEXT_CHARS = 16_000
MAX_PATH_CHARS = 4096
MAX_PATHS = 1000
MAX_WAIT_SECONDS = 600
#: What JSON numbers are exact up to.
MAX_VERSION = (1 << 53) - 1
#: Bytes of what a session hands over, and of a value that it shares, as JSON in UTF-8.
MAX_HANDOFF_BYTES = 1 << 20
MAX_SHARED_BYTES = 1 << 18


class Argument:
    """One fact that a command takes: a word of the command line where `is_word`, else an option."""

    __slots__ = ("choices", "help", "is_needed", "is_word", "kind", "metavar", "name", "option")

    def __init__(
        self,
        name: str,
        kind: str,
        help: str,
        *,
        is_word: bool = False,
        is_needed: bool = False,
        choices: Sequence[str] = (),
        option: str = "",
        metavar: str = "",
    ) -> None:
        self.name, self.kind, self.help = name, kind, help
        self.is_word, self.is_needed, self.choices = is_word, is_needed, tuple(choices)
        self.option = option or "--" + name.replace("_", "-")
        self.metavar = metavar or name.upper()


class SessionCommand:
    """A command: its name on the wire, the words by which it is typed, what it takes, and how it is explained.

    One that `is_for_all` can be typed outside of sessions, too.
    """

    __slots__ = ("arguments", "examples", "help", "is_for_all", "more", "name", "typed")

    def __init__(
        self,
        name: str,
        help: str,
        more: str,
        *arguments: Argument,
        examples: Sequence[str] = (),
        typed: str = "",
        is_for_all: bool = False,
    ) -> None:
        self.name, self.help, self.more = name, help, more
        self.arguments, self.examples = arguments, tuple(examples)
        self.typed = tuple((typed or name).split())
        self.is_for_all = is_for_all


_PATHS_HELP = "Files, or folders with all in them, from the current folder."
_KEY = Argument("key", TEXT, "Its name, such as `api/port`.", is_word=True, is_needed=True)

#: What an agent can ask for, by name; all of these are commands of `council` and tools of its MCP server.
SESSION_COMMANDS = {
    one.name: one
    for one in (
        SessionCommand(
            "lock",
            "Take files for this session alone, all of them or none.",
            "Who takes files that another session has is told whose they are and since when.",
            Argument("paths", PATHS, _PATHS_HELP, is_word=True, is_needed=True, metavar="PATH"),
            Argument(
                "wait",
                SECONDS,
                "Seconds to wait for files that others have; by default 5, or the run's.",
                metavar="SECONDS",
            ),
            examples=("council lock src/models.py", "council lock src/api docs/api.md --wait 60"),
        ),
        SessionCommand(
            "unlock",
            "Give files back that this session took.",
            "At the end of a session all that it took is given back.",
            Argument("paths", PATHS, _PATHS_HELP, is_word=True, is_needed=True, metavar="PATH"),
            examples=("council unlock src/models.py",),
        ),
        SessionCommand(
            "report",
            "Tell the other sessions what this one is at.",
            "What is not given stays as it was told last.",
            Argument("status", TEXT, "How it stands.", choices=("working", "blocked", "waiting", "done")),
            Argument("file", PATH, "The file that it works at."),
            Argument("message", TEXT, "A sentence for the others."),
            Argument("progress", TEXT, "How far it is, such as `50%`."),
            Argument("blocked_on", TEXT, "What it waits for, such as a task or a file."),
            examples=(
                "council report --status working --file src/models.py --progress 50%",
                "council report --status blocked --blocked-on models --message 'waits for the User model'",
            ),
        ),
        SessionCommand(
            "peers",
            "List the sessions that are at work now, and what they are at.",
            "This one is among them, marked.",
            examples=("council peers", "council peers --json"),
        ),
        SessionCommand(
            "note",
            "Leave a note for later sessions.",
            "They find it by its task, its topic or its paths.",
            Argument("text", TEXT, "What to remember.", is_word=True, is_needed=True),
            Argument("topic", TEXT, "What it is about, in a word."),
            Argument("paths", PATHS, "A file or a pattern that it is about.", option="--path", metavar="PATH"),
            examples=("council note 'The tests need the database of port 5433.' --topic tests",),
        ),
        SessionCommand(
            "notes",
            "Show the notes that sessions left.",
            "Without an option all of them, whichever task left them; of many the newest.",
            Argument("task", TEXT, "Only those of this task."),
            Argument("topic", TEXT, "Only those about this topic."),
            Argument("paths", PATHS, "Only those about this file or pattern.", option="--path", metavar="PATH"),
            examples=("council notes --topic tests", "council notes --path src/models.py --json"),
        ),
        SessionCommand(
            "ask",
            "Show how another task stands: its plan, its changes so far, what its program says.",
            "It is not disturbed by that.",
            Argument("task", TEXT, "The id of the task.", is_word=True, is_needed=True),
            examples=("council ask models", "council ask models --json"),
        ),
        SessionCommand(
            "share_put",
            "Share a value with the other sessions of the run.",
            "It replaces what is there under its key, and whoever waits for that is told.",
            _KEY,
            Argument(
                "value",
                VALUE,
                "What to share: JSON of at most 256 KiB, or text.",
                is_word=True,
                is_needed=True,
            ),
            Argument("if_version", VERSION, "Only if it is at this version now; 0: only if there is none."),
            examples=("council share put api/port 8080", "council share put api/routes '[\"/login\"]' --if-version 3"),
            typed="share put",
            is_for_all=True,
        ),
        SessionCommand(
            "share_get",
            "Show a value that sessions share.",
            "With its version, and who put it there.",
            _KEY,
            examples=("council share get api/port", "council share get schema --json"),
            typed="share get",
            is_for_all=True,
        ),
        SessionCommand(
            "share_wait",
            "Wait for a value that another session is to share.",
            "What is there already is had at once, unless a later version is asked for.",
            _KEY,
            Argument("after", VERSION, "Wait for a later version than this one."),
            Argument("timeout", SECONDS, "Seconds to wait; by default 30.", metavar="SECONDS"),
            examples=("council share wait api/port", "council share wait schema --after 3 --timeout 300"),
            typed="share wait",
            is_for_all=True,
        ),
        SessionCommand(
            "share_list",
            "List what the sessions of the run share.",
            "Keys with their versions and sizes, without the values.",
            Argument("prefix", TEXT, "Only keys that begin with this."),
            examples=("council share list", "council share list --prefix api/"),
            typed="share list",
            is_for_all=True,
        ),
        SessionCommand(
            "submit_handoff",
            "Hand over what this session's phase is to produce.",
            "Who hands over what is not right is told why, and can mend it; of several the last counts.",
            Argument(
                "data",
                OBJECT,
                "The handoff, a JSON object of at most 1 MiB.",
                is_word=True,
                is_needed=True,
                metavar="FILE",
            ),
            examples=("council submit-handoff plan.json", "council submit-handoff - --json"),
            typed="submit-handoff",
        ),
    )
}

#: The same by the words by which they are typed.
COMMANDS_BY_WORDS = {one.typed: one for one in SESSION_COMMANDS.values()}

#: What a hook asks before an edit; no command of its own.
CHECK_EDIT = SessionCommand(
    "check_edit",
    "Whether this session may edit a file.",
    "",
    Argument("path", PATH, "The file.", is_word=True, is_needed=True),
)
