"""A fake Auto-Claude 2.7, written from its published behaviour: `runners/spec_runner.py` and `run.py` of a clone.

Steps of the task: `write PATH TEXT` (a subtask that is committed), `leave PATH TEXT` (not committed), `spend IN OUT`,
`say TEXT`, `qa approved`, `qa rejected TITLE`, `stuck` (a subtask that is never completed), `error STATUS TEXT` (an API
error, after which it retries without a limit), `error once STATUS TEXT`, `hang`.

As the real one: it edits and commits `.gitignore` unless its marker exists, builds in a worktree of its own without
`--direct`, writes files of its own in the project, accepts only OAuth tokens, and exits with 0 if its QA rejects.
"""

# ruff: noqa: T201  it is a program

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.fakes.script import steps, write


def install(folder: Path) -> Path:
    """Create a clone with its two programs; return its folder."""
    root = Path(__file__).parents[2]
    for name in ("run.py", "runners/spec_runner.py"):
        program = folder / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(
            f"import sys\nsys.path.insert(0, {str(root)!r})\n"
            f"from tests.fakes import auto_claude\nsys.exit(auto_claude.main({name!r}))\n"
        )
    return folder


def mark(kind: str, **data: Any) -> None:
    """Print a line for its user interface; the last text may have no line break."""
    print(f"__{kind}__:{json.dumps(data)}", flush=True)


def say(text: str, kind: str = "text") -> None:
    print(text, end="", flush=True)
    mark("TASK_LOG_TEXT", content=text, phase="coding", type=kind, subtask_id=None, timestamp="")


def record(**line: Any) -> None:
    """Append to the conversation of Claude Code."""
    folder = Path(os.environ["CLAUDE_CONFIG_DIR"]) / "projects" / "-work"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "conversation.jsonl").open("a") as file:
        file.write(json.dumps({"type": "assistant", **line}) + "\n")


def spend(call: int, sent: int, received: int) -> None:
    """Record a model call: each part of its response repeats the usage so far."""
    usage = {"input_tokens": sent - 7, "cache_read_input_tokens": 4, "cache_creation_input_tokens": 3}
    for output in (1, received):
        record(message={"id": f"msg_{call}", "usage": {**usage, "output_tokens": output}, "content": []})


def fail(status: str, text: str) -> None:
    """Report an API error as Claude Code does, in the conversation and as a message."""
    text = f"API Error: {status} {text}"
    record(isApiErrorMessage=True, message={"id": "e", "content": [{"type": "text", "text": text}]})
    say(text)


def git(project: Path, *arguments: str, checked: bool = True) -> None:
    identity = {f"GIT_{who}_{what}": "agent@x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    subprocess.run(["git", *arguments], cwd=project, env={**os.environ, **identity}, check=checked, capture_output=True)


def prepare(project: Path) -> None:
    """Create its folder; commit a change to .gitignore unless it was checked before."""
    marker = project / ".auto-claude/.gitignore_checked"
    if marker.exists():
        return
    marker.parent.mkdir(exist_ok=True)
    (project / ".gitignore").write_text("\n# Auto Claude generated files\n.auto-claude/\n")
    git(project, "add", ".gitignore")
    git(project, "commit", "-m", "chore: add auto-claude entries to .gitignore")
    marker.touch()


def write_spec(options: argparse.Namespace) -> int:
    """Write the spec of a task, and its plan."""
    project, spec = options.project_dir, options.spec_dir
    prepare(project)
    spec.mkdir(parents=True)
    task = options.task_file.read_text()
    (spec / "spec.md").write_text(task)
    subtasks = [
        {"id": f"1-{number}", "description": "x", "status": "pending"}
        for number, (word, _, _) in enumerate(steps(task))
        if word in {"write", "stuck"}
    ]
    plan = {"feature": "x", "workflow_type": "simple", "phases": [{"id": "1", "name": "Build", "subtasks": subtasks}]}
    (spec / "implementation_plan.json").write_text(json.dumps(plan))
    (spec / "review_state.json").write_text(json.dumps({"approved": options.auto_approve}))
    mark("TASK_LOG_PHASE_START", phase="planning", timestamp="")
    say("The spec is written.")
    return 0


def build(options: argparse.Namespace) -> int:
    """Build a spec and review it."""
    project: Path = options.project_dir
    prepare(project)
    spec = project / ".auto-claude/specs" / options.spec
    if not json.loads((spec / "review_state.json").read_text())["approved"]:
        print("BUILD BLOCKED - REVIEW REQUIRED")
        return 1
    if not {"CLAUDE_CODE_OAUTH_TOKEN", "ANTHROPIC_AUTH_TOKEN"} & os.environ.keys():
        print("Error: No OAuth token found")
        return 1
    if not options.direct:
        tree = project / ".auto-claude/worktrees/tasks" / options.spec
        git(project, "worktree", "add", str(tree), "-b", f"auto-claude/{options.spec}")
        project = tree
    for name in (".auto-claude-status", ".claude_settings.json", ".auto-claude-security.json"):
        (project / name).write_text("{}\n")
    mark("EXEC_PHASE", phase="coding", message="Starting implementation")
    work(project, spec, options)
    return 0


def work(project: Path, spec: Path, options: argparse.Namespace) -> None:
    """Perform the steps in a spec."""
    file = spec / "implementation_plan.json"
    plan = json.loads(file.read_text())
    subtasks = iter(plan["phases"][0]["subtasks"])
    for number, (word, first, rest) in enumerate(steps((spec / "spec.md").read_text())):
        if word in {"write", "leave"}:
            mark("TASK_LOG_TOOL_START", name="Write", input=str(project / first), phase="coding")
            write(str(project / first), rest)
            mark("TASK_LOG_TOOL_END", name="Write", success=True, phase="coding")
        if word == "write":
            next(subtasks)["status"] = "completed"
            git(project, "add", ".", ":!.auto-claude", checked=False)  # it adds, but exits with 1 if that is ignored
            git(project, "commit", "-m", f"auto-claude: Complete {first}")
        elif word == "qa" and not options.skip_qa:
            mark("EXEC_PHASE", phase="qa_review", message="Starting QA validation")
            plan["qa_signoff"] = {"status": first, "qa_session": 1, "issues_found": [{"title": rest}] if rest else []}
            (spec / "qa_report.md").write_text(first)
        else:
            talk(number, word, first, rest)
    file.write_text(json.dumps(plan))


def talk(number: int, word: str, first: str, rest: str) -> None:
    """Perform a step that changes no file."""
    if word == "spend":
        spend(number, int(first), int(rest))
        say("Spent.")
    elif word == "say":
        say(f"{first} {rest}")
    elif word == "error" and first == "once":
        fail(*rest.split(maxsplit=1))
    elif word == "error":
        while True:
            fail(first, rest)
            time.sleep(0.05)
    elif word == "hang":
        time.sleep(600)


def main(program: str) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--project-dir", type=Path, default=Path.cwd())
    parser.add_argument("--model")
    parser.add_argument("--direct", action="store_true")
    if program == "run.py":
        parser.add_argument("--spec", required=True)
        parser.add_argument("--auto-continue", action="store_true", required=True)
        parser.add_argument("--skip-qa", action="store_true")
        return build(parser.parse_args())
    parser.add_argument("--task-file", type=Path, required=True)
    parser.add_argument("--spec-dir", type=Path, required=True)
    parser.add_argument("--complexity", choices=["simple", "standard", "complex"])
    parser.add_argument("--auto-approve", action="store_true")
    parser.add_argument("--no-build", action="store_true", required=True)
    return write_spec(parser.parse_args())


if __name__ == "__main__":
    sys.exit("install it with `install`")
