"""The session commands, as one table.

The command line, the MCP tools, the help and the request validation are derived from it.
"""

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
#: Any JSON value. On a command line, text that is not JSON is a string, and `-` reads standard input.
VALUE = "value"
#: A JSON object. On a command line, the name of a file that contains it; standard input by default.
OBJECT = "object"
STANDARD_INPUT = "-"

#: The name of council's own MCP server among those of a session.
MCP_SERVER_NAME = "council"

MAX_REQUEST_BYTES = (1 << 20) + (1 << 17)
MAX_TEXT_CHARS = 16_000
MAX_PATH_CHARS = 4096
MAX_PATHS = 1000
MAX_WAIT_SECONDS = 600
#: The largest integer that every JSON parser reads exactly.
MAX_VERSION = (1 << 53) - 1
#: Bytes of a handoff and of a shared value, as JSON in UTF-8.
MAX_HANDOFF_BYTES = 1 << 20
MAX_SHARED_BYTES = 1 << 18


class Argument:
    """One argument of a command.

    With `is_word`, it is required, and positional on the command line; otherwise it is an option.
    """

    __slots__ = ("choices", "help", "is_word", "kind", "metavar", "name", "option")

    def __init__(
        self,
        name: str,
        kind: str,
        help: str,  # noqa: A002  as click names it
        *,
        is_word: bool = False,
        choices: Sequence[str] = (),
        option: str = "",
        metavar: str = "",
    ) -> None:
        self.name, self.kind, self.help = name, kind, help
        self.is_word, self.choices = is_word, tuple(choices)
        self.option = option or "--" + name.replace("_", "-")
        self.metavar = metavar or name.upper()


class SessionCommand:
    """A command: protocol name, words on the command line, arguments and help.

    The names of the commands of a `group` begin with its name; they are also available outside sessions.
    """

    __slots__ = ("arguments", "examples", "help", "is_for_all", "more", "name", "typed")

    def __init__(
        self,
        name: str,
        help: str,  # noqa: A002  as click names it
        more: str,
        *arguments: Argument,
        examples: Sequence[str] = (),
        group: str = "",
    ) -> None:
        self.name, self.help, self.more = name, help, more
        self.arguments, self.examples = arguments, tuple(examples)
        words = (group, name.removeprefix(f"{group}_")) if group else (name,)
        self.typed = tuple(word.replace("_", "-") for word in words)
        self.is_for_all = bool(group)


_PATHS_HELP = "Files, or folders with everything in them, relative to the current folder."
_KEY = Argument("key", TEXT, "The name of the value, such as `api/port`.", is_word=True)

#: The session commands by name. Each is a command of `council` and a tool of its MCP server.
SESSION_COMMANDS = {
    command.name: command
    for command in (
        SessionCommand(
            "lock",
            "Lock files for this session, all of them or none.",
            "If another session owns a file, shows the owner and the time.",
            Argument("paths", PATHS, _PATHS_HELP, is_word=True, metavar="PATH"),
            Argument(
                "wait",
                SECONDS,
                "Seconds to wait for files that other sessions own. Default: the setting of the run, or 5.",
                metavar="SECONDS",
            ),
            examples=("council lock src/models.py", "council lock src/api docs/api.md --wait 60"),
        ),
        SessionCommand(
            "unlock",
            "Release files that this session locked.",
            "The end of a session releases all of its locks.",
            Argument("paths", PATHS, _PATHS_HELP, is_word=True, metavar="PATH"),
            examples=("council unlock src/models.py",),
        ),
        SessionCommand(
            "report",
            "Report the status of this session to the other sessions.",
            "Omitted options keep their last reported value.",
            Argument("status", TEXT, "The status.", choices=("working", "blocked", "waiting", "done")),
            Argument("file", PATH, "The file that the session is editing."),
            Argument("message", TEXT, "A sentence for the other sessions."),
            Argument("progress", TEXT, "The progress, such as `50%`."),
            Argument("blocked_on", TEXT, "The obstacle that blocks the session, such as a task or a file."),
            examples=(
                "council report --status working --file src/models.py --progress 50%",
                "council report --status blocked --blocked-on models --message 'waits for the User model'",
            ),
        ),
        SessionCommand(
            "peers",
            "List the active sessions and their current activity.",
            "The list includes and marks this session.",
            examples=("council peers", "council peers --json"),
        ),
        SessionCommand(
            "note",
            "Leave a note for later sessions.",
            "Sessions find notes by task, topic or path.",
            Argument("text", TEXT, "The text of the note.", is_word=True),
            Argument("topic", TEXT, "The topic, one word."),
            Argument("paths", PATHS, "A file or pattern that the note is about.", option="--path", metavar="PATH"),
            examples=("council note 'The tests need the database on port 5433.' --topic tests",),
        ),
        SessionCommand(
            "notes",
            "Show the notes that sessions left.",
            "Without options shows the notes of all tasks; if there are many, the newest.",
            Argument("task", TEXT, "Only notes of this task."),
            Argument("topic", TEXT, "Only notes about this topic."),
            Argument("paths", PATHS, "Only notes about this file or pattern.", option="--path", metavar="PATH"),
            examples=("council notes --topic tests", "council notes --path src/models.py --json"),
        ),
        SessionCommand(
            "ask",
            "Show the state of another task: its plan, its changes so far, its recent output.",
            "The session of the task is not interrupted.",
            Argument("task", TEXT, "The id of the task.", is_word=True),
            examples=("council ask models", "council ask models --json"),
        ),
        SessionCommand(
            "share_put",
            "Share a value with the other sessions of the run.",
            "Replaces the current value of the key and wakes its waiters.",
            _KEY,
            Argument(
                "value",
                VALUE,
                "The value: JSON of at most 256 KiB, or text.",
                is_word=True,
            ),
            Argument("if_version", VERSION, "Only if the key has this version; 0: only if it has no value."),
            examples=("council share put api/port 8080", "council share put api/routes '[\"/login\"]' --if-version 3"),
            group="share",
        ),
        SessionCommand(
            "share_get",
            "Show a shared value.",
            "--json also prints its version and its writer.",
            _KEY,
            examples=("council share get api/port", "council share get schema --json"),
            group="share",
        ),
        SessionCommand(
            "share_wait",
            "Wait until another session shares a value.",
            "Returns an existing value immediately, unless --after asks for a later version.",
            _KEY,
            Argument("after", VERSION, "Wait for a version later than this one."),
            Argument("timeout", SECONDS, "Seconds to wait. Default: 30.", metavar="SECONDS"),
            examples=("council share wait api/port", "council share wait schema --after 3 --timeout 300"),
            group="share",
        ),
        SessionCommand(
            "share_list",
            "List the shared values of the run.",
            "Shows keys with their versions and sizes, without the values.",
            Argument("prefix", TEXT, "Only keys that begin with this text."),
            examples=("council share list", "council share list --prefix api/"),
            group="share",
        ),
        SessionCommand(
            "submit_handoff",
            "Submit the handoff of this session's phase.",
            "An invalid handoff is rejected with its errors, so that it can be fixed. Only the last valid one counts.",
            Argument(
                "data",
                OBJECT,
                "The handoff, a JSON object of at most 1 MiB.",
                is_word=True,
                metavar="FILE",
            ),
            examples=("council submit-handoff plan.json", "council submit-handoff - --json"),
        ),
    )
}

#: The session commands by the words that invoke them.
COMMANDS_BY_WORDS = {command.typed: command for command in SESSION_COMMANDS.values()}

#: The request of the pre-edit hook; not a command.
CHECK_EDIT = SessionCommand(
    "check_edit",
    "Check whether this session may edit a file.",
    "",
    Argument("path", PATH, "The file.", is_word=True),
)
#: The request of the stop hook; not a command.
BEGIN_STOP = SessionCommand("begin_stop", "Return the checks to run before this session ends.", "")
#: The request of the hook after a tool call; not a command.
TAKE_MESSAGES = SessionCommand("take_messages", "Return new messages of the user.", "")
#: The request of `council slot`: it is answered once the session holds a slot, and releases it by disconnecting.
HOLD_SLOT = SessionCommand("hold_slot", "Hold a slot for a heavy command.", "")
#: The requests that are not commands, by name.
HOOK_REQUESTS = {request.name: request for request in (CHECK_EDIT, BEGIN_STOP, TAKE_MESSAGES, HOLD_SLOT)}
