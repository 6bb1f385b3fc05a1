"""Selection of a CLI's tool and arguments for each step of a script."""

from __future__ import annotations

import json
import posixpath
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeAlias

from tests.model_server.conversation import Json, ModelRequest, Tool


@dataclass(frozen=True, slots=True)
class WriteStep:
    """Create or replace a file."""

    verb: ClassVar[str] = "write a file"
    path: str
    content: str


@dataclass(frozen=True, slots=True)
class RunStep:
    """Run a shell command."""

    verb: ClassVar[str] = "run a command"
    command: str


@dataclass(frozen=True, slots=True)
class UseToolStep:
    """Call a tool by name; for a server's tool without the prefix of the CLI."""

    name: str
    arguments: Json

    @property
    def verb(self) -> str:
        """Return a description of the step."""
        return f"do {self.name}"


ScriptStep: TypeAlias = WriteStep | RunStep | UseToolStep


@dataclass(frozen=True, slots=True)
class ToolUse:
    """A tool and its arguments."""

    tool: Tool
    arguments: Json | str


# The CLIs' tool names, in order of preference: Claude Code, Gemini CLI and Qwen Code, opencode, Copilot, OpenHands.
_WRITERS: Final = ("Write", "write_file", "write", "create", "file_editor", "str_replace_editor")
_NOT_WRITERS: Final = re.compile(r"todo|memory|stdin|plan", re.IGNORECASE)
# Claude Code, Gemini CLI and Qwen Code, opencode and Copilot, Codex by its version, OpenHands, Cline.
_SHELLS: Final = (
    "Bash",
    "run_shell_command",
    "bash",
    "shell_command",
    "exec_command",
    "shell",
    "local_shell",
    "terminal",
    "execute_bash",
    "run_commands",
)
_ANY_SHELL: Final = re.compile(r"bash|shell|terminal|exec", re.IGNORECASE)
_PATHS: Final = ("file_path", "filePath", "path", "absolute_path", "filename", "file")
_CONTENTS: Final = ("content", "contents", "file_text", "text", "new_content")
_COMMANDS: Final = ("command", "cmd", "script", "commands")
_END: Final = "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
_DIRECTORY: Final = re.compile(
    r"""(?:
        working[ ]directory(?:[ ]is)?(?:[ ]\([^)]*\))?:?
      | working[ ]in[ ]the[ ]directory:
      | <cwd>
      | workspace[ ]directories:[*\s]*-[ ]
    )[ \t*`'"]*(?P<path>/(?:[^\n<`'",.;]|[,.;](?=\S))*)""",
    re.VERBOSE | re.IGNORECASE,
)


def working_directory(asked: ModelRequest) -> str | None:
    """Return the working directory named by the CLI, or None."""
    for text in (asked.system, *(turn.text for turn in asked.turns)):
        if (found := _DIRECTORY.search(text)) is not None:
            return found["path"].rstrip()
    return None


def tool_call_for(step: ScriptStep, asked: ModelRequest) -> ToolUse | None:
    """Return the tool call for a step; None if no offered tool fits."""
    if isinstance(step, RunStep):
        return _shell(step.command, asked.tools)
    if isinstance(step, UseToolStep):
        return _use(step, asked.tools)
    by_name = {tool.name: tool for tool in asked.tools}
    writers = [by_name[name] for name in _WRITERS if name in by_name]
    writers += [tool for tool in asked.tools if "write" in tool.name.lower() and not _NOT_WRITERS.search(tool.name)]
    for tool in writers:
        if (made := _write(step, tool, working_directory(asked))) is not None:
            return made
    if (patcher := by_name.get("apply_patch")) is not None:
        return _patch(step, patcher)
    if (program := _program("apply_patch", _add_file(step), asked.tools)) is not None:
        return program
    return _shell(_writing_command(step), asked.tools)


def ending_command(asked: ModelRequest, text: str) -> RunStep | None:
    """Return the command that ends a session with a text; None if the client needs none, unlike mini-swe-agent."""
    if not any(_END in shown for shown in (asked.system, *(turn.text for turn in asked.turns))):
        return None
    return RunStep(f"echo {_END} && printf '%s\\n' {shlex.quote(text)}")


def _use(step: UseToolStep, tools: Iterable[Tool]) -> ToolUse | None:
    """Return the call of a tool, or a tool search where the client loads such tools on request."""
    found = None
    for tool in tools:
        if tool.kind == "function" and (tool.name == step.name or tool.name.endswith(f"_{step.name}")):
            return ToolUse(tool, step.arguments)
        if tool.kind == "search":
            found = ToolUse(tool, {"query": step.name})
    return found


def _write(step: WriteStep, tool: Tool, directory: str | None) -> ToolUse | None:
    offered = tool.parameters.get("properties", {})
    path = next((name for name in _PATHS if name in offered), None)
    content = next((name for name in _CONTENTS if name in offered), None)
    if tool.kind != "function" or path is None or content is None:
        return None
    # Some of these tools reject relative paths, none rejects absolute ones.
    arguments = {path: posixpath.join(directory, step.path) if directory else step.path, content: step.content}
    if "create" in offered.get("command", {}).get("enum", ()):
        arguments["command"] = "create"
    return ToolUse(tool, _completed(arguments, tool))


def _add_file(step: WriteStep) -> str:
    """Return a patch in the format of Codex; adding an existing file replaces it."""
    lines = "".join(f"+{line}\n" for line in step.content.splitlines())
    return f"*** Begin Patch\n*** Add File: {step.path}\n{lines}*** End Patch\n"


def _program(function: str, argument: Json | str, tools: Iterable[Tool]) -> ToolUse | None:
    """Return a program that calls one function, if an offered tool may run it."""
    for tool in tools:
        if tool.kind == "program" and function in tool.parameters["properties"]:
            return ToolUse(tool, f"text(await tools.{function}({json.dumps(argument)}));\n")
    return None


def _patch(step: WriteStep, tool: Tool) -> ToolUse:
    patch = _add_file(step)
    if tool.kind == "freeform":
        return ToolUse(tool, patch)
    name = next(iter(tool.parameters.get("properties", {})), "input")
    return ToolUse(tool, _completed({name: patch}, tool))


def _writing_command(step: WriteStep) -> str:
    path = shlex.quote(step.path)
    folder = posixpath.dirname(step.path)
    make = f"mkdir -p {shlex.quote(folder)} && " if folder else ""
    return f"{make}printf '%s' {shlex.quote(step.content)} > {path}"


def _shell(command: str, tools: Iterable[Tool]) -> ToolUse | None:
    by_name = {tool.name: tool for tool in tools}
    shells = [by_name[name] for name in _SHELLS if name in by_name]
    shells += [tool for tool in by_name.values() if _ANY_SHELL.search(tool.name)]
    for tool in shells:
        if tool.kind == "local-shell":
            return ToolUse(tool, command)
        offered = tool.parameters.get("properties", {})
        name = next((name for name in _COMMANDS if name in offered), None)
        if tool.kind == "function" and name is not None:
            words = [command] if name == "commands" else ["bash", "-lc", command]
            is_list = offered[name].get("type") == "array"
            return ToolUse(tool, _completed({name: words if is_list else command}, tool))
    return _program("exec_command", {"cmd": command}, by_name.values())


def _completed(arguments: Json, tool: Tool) -> Json:
    """Return the arguments with placeholders for the other required ones."""
    offered = tool.parameters.get("properties", {})
    missing = [name for name in tool.parameters.get("required", ()) if name not in arguments]
    return arguments | {name: _something(offered.get(name, {})) for name in missing}


def _something(schema: Json) -> Any:
    if choices := schema.get("enum"):
        return choices[0]
    some = {"boolean": False, "integer": 1, "number": 1, "array": [], "object": {}}
    return some.get(str(schema.get("type", "string")).lower(), "a step of the script")
