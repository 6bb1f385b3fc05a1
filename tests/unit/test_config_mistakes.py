"""Every mistake in a file is reported at once, with its position and fix."""

import os
import re
from pathlib import Path

import pytest

from adapters.claude_code import ClaudeCodeAdapter
from adapters.command.adapter import CommandAdapter
from orchestrator.config.load import load_config
from orchestrator.errors import ConfigError
from orchestrator.protocols import AdapterType

TYPES: dict[str, AdapterType] = {"command": CommandAdapter, "claude-code": ClaudeCodeAdapter}
HEAD = "version: 1\nadapters: {x: {use: command, argv: [x]}}\n"  # two lines
TASKS = "tasks: [{id: a, prompt: p}]\n"
TOKEN = "ghp_" + "a1B2" * 9
TAIL = "adapters: {x: {use: command, argv: [x]}}\ntasks: [{id: a, prompt: p}]\n"


def mistakes(folder: Path, content: str | bytes) -> list[tuple[int, int, str]]:
    path = folder / "council.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError) as caught:
        load_config(path, TYPES)
    for problem in caught.value.problems:
        assert str(problem).startswith(f"{path}:{problem.line}:{problem.column}: ")
        assert problem.message
        assert problem.remedy
    return [(p.line, p.column, f"{p.message}: {p.remedy}") for p in caught.value.problems]


def adapter(options: str) -> str:
    return f"version: 1\nadapters:\n  x:\n    use: command\n{options}{TASKS}"


def reading(rule: str) -> str:
    return adapter(f"    argv: [x]\n    output: jsonl\n    read: [{{{rule}}}]\n")


def worktrees(settings: str, top: str = "") -> str:
    return f"{HEAD}{TASKS}{top}worktrees:\n{settings}"


# fmt: off
ONE_MISTAKE: dict[str, tuple[str | bytes, int, int, str]] = {
    "empty": ("", 1, 1, "is empty: add the keys version, adapters and tasks"),
    "only a comment": ("# x\n", 1, 1, "is empty"),
    "null document": ("---\n", 1, 1, "is empty"),
    "a list": ("\n- x\n", 2, 1, "not a mapping: start with the keys"),
    "a word": ("hello\n", 1, 1, "not a mapping"),
    "second document": (HEAD + TASKS + "---\na: b\n", 4, 1, "second document"),
    "tab": (HEAD + "tasks:\n\t- id: a\n", 4, 1, "indentation by a tab: use spaces"),
    "colon in text": (HEAD + "tasks:\n  - id: a\n    prompt: fix: it\n", 5, 16, "quote text that contains ': '"),
    "open bracket": (HEAD + "tasks: [{id: a\n\n\n", 3, 9, "close the bracket"),
    "open quote": (HEAD + 'tasks: "x\n\n', 3, 8, "close the quotes"),
    "at sign": (HEAD + "repo: @x\n", 3, 7, "quote text that begins with @"),
    "bad escape": (HEAD + 'repo: "\\q"\n', 3, 8, "double the backslash"),
    "control character": (HEAD + TASKS + "# \x01\n", 4, 3, "'\\x01' is not allowed: remove it"),
    "escaped NUL": (HEAD + 'tasks: [{id: a, prompt: "x\\0"}]\n', 3, 25, "contains the character '\\x00': remove"),
    "not UTF-8": (HEAD.encode() + b"# \xc3\xa4\xff", 3, 4, "0xff is not UTF-8: save"),
    "not UTF-8 behind a mark": (b"\xef\xbb\xbf# \xff", 1, 3, "0xff is not UTF-8: save"),
    "UTF-16": ("version: 1".encode("utf-16"), 1, 1, "is not UTF-8: save"),
    "too deep": (HEAD + "tasks: " + "[" * 100 + "]" * 100, 3, 8 + 63, "more than 64 nested collections"),
    "word for a number": (HEAD + TASKS + "budget: {cost: ten}\n", 4, 16, "'ten': use a number, without quotes"),
    "unknown failure class": (adapter("    argv: [x]\n    failures: {oth: x}\n"), 6, 16, "unknown key 'oth': use 'tr"),
    "alias": (HEAD + TASKS + "repo: *x\n", 4, 7, "aliases are not supported: repeat the value of *x in full"),
    "anchor": (HEAD + TASKS + "repo: &x .\n", 4, 7, "anchors are not supported: remove &x"),
    "tag": (HEAD + TASKS + "repo: !!str .\n", 4, 7, "tags are not supported"),
    "bare tag": (HEAD + TASKS + "repo: ! .\n", 4, 7, "tags are not supported"),
    "tag of an object": (HEAD + TASKS + "repo: !!python/object:os.system .\n", 4, 7, "'!!python/object:os.system'"),
    "tagged mapping": (HEAD + "tasks: [!!map {id: a, prompt: p}]\n", 3, 9, "tags are not supported"),
    "merge key": (HEAD + TASKS + "<<: {}\n", 4, 1, "merge keys are not supported"),
    "duplicate key": (HEAD + TASKS + "'version': 1\n", 4, 1, "already defined on line 1"),
    "number as key": (HEAD + TASKS + "1: 2\n", 4, 1, "a key must be text"),
    "list as key": (HEAD + TASKS + "? [a]\n: 2\n", 4, 3, "a key must be text"),
    "infinite": (HEAD + TASKS + "capacity: .inf\n", 4, 11, "not finite"),
    "overflow": (HEAD + TASKS + "capacity: 1e999\n", 4, 11, "not finite"),
    "not a number": (HEAD + TASKS + "capacity: .NaN\n", 4, 11, "not finite"),
    "huge": (HEAD + TASKS + f"capacity: {'9' * 5000}\n", 4, 11, "too large"),
    "unknown key": (HEAD + TASKS + "capcity: 2\n", 4, 1, "unknown key 'capcity': did you mean 'capacity'?"),
    "unknown, nothing like it": (HEAD + TASKS + "zzz: 2\n", 4, 1, "the keys here are version, repo"),
    "unknown in a task": (HEAD + "tasks:\n- id: a\n  prompt: p\n  atempts: 2\n", 6, 3, "did you mean 'attempts'?"),
    "unknown in backoff": (HEAD + TASKS + "defaults: {backoff: {jiter: true}}\n", 4, 22, "did you mean 'jitter'?"),
    "missing version": (TAIL, 1, 1, "the key 'version' is missing: add `version:`"),
    "missing id": (HEAD + "tasks:\n  - prompt: p\n", 4, 5, "the key 'id' is missing"),
    "missing use": ("version: 1\nadapters:\n  x:\n    argv: [x]\n" + TASKS, 4, 5, "the key 'use' is missing"),
    "version 2": ("version: 2\n" + TAIL, 1, 10, "unsupported version 2: use 1"),
    "version true": ("version: true\n" + TAIL, 1, 10, "the boolean true: use a whole number"),
    "version 1.0": ("version: 1.0\n" + TAIL, 1, 10, "the number 1.0: use a whole number"),
    "quoted number": (HEAD + TASKS + 'capacity: "4"\n', 4, 11, "capacity is the text '4': use a whole number"),
    "capacity 0": (HEAD + TASKS + "capacity: 0\n", 4, 11, "capacity is the number 0: use 1 or more"),
    "capacity 1001": (HEAD + TASKS + "capacity: 1001\n", 4, 11, "use 1000 or less"),
    "attempts 101": (HEAD + "tasks: [{id: a, prompt: p, attempts: 101}]\n", 3, 38, "use 100 or less"),
    "factor": (HEAD + TASKS + "defaults: {backoff: {factor: 0.9}}\n", 4, 30, "use 1.0 or more"),
    "on": (HEAD + TASKS + "defaults: {backoff: {jitter: on}}\n", 4, 30, "the text 'on': use true or false"),
    "empty value": (HEAD + TASKS + "target:\n", 4, 8, "target is empty: set a value, or omit the key"),
    "empty in a task": (HEAD + "tasks: [{id: a, prompt: p, timeout: null}]\n", 3, 37, "timeout is empty"),
    "bare duration": (HEAD + TASKS + "defaults: {timeout: 30}\n", 4, 21, "bare number 30: add its unit, such as 30s"),
    "duration of nothing": (HEAD + TASKS + "defaults: {timeout: 0s}\n", 4, 21, "is zero"),
    "long duration": (HEAD + TASKS + "defaults: {timeout: 30d1s}\n", 4, 21, "at most 30d"),
    "no duration": (HEAD + TASKS + "defaults: {timeout: 1.5h}\n", 4, 21, "'1.5h': write whole numbers with units"),
    "bad id": (HEAD + "tasks: [{id: a/b, prompt: p}]\n", 3, 14, "'a/b' can't be a name: use up to 64"),
    "bad adapter name": ("version: 1\nadapters:\n  a..b: {use: command, argv: [x]}\n" + TASKS, 3, 3, "'a..b' can't"),
    "bad branch": (HEAD + TASKS + "base: a..b\n", 4, 7, "it contains '..'"),
    "no folder": (HEAD + TASKS + "repo: nope\n", 4, 7, "there is no folder 'nope'"),
    "network as a boolean": (HEAD + TASKS + "network: true\n", 4, 10, "the boolean true: write on, off, or {allow:"),
    "network as a list": (HEAD + TASKS + "network: [a.example]\n", 4, 10, "be a list: write on, off, or {allow:"),
    "network without hosts": (HEAD + TASKS + "network: {}\n", 4, 10, "the key 'allow' is missing"),
    "network with no host": (HEAD + TASKS + "network: {allow: []}\n", 4, 18, "allow is an empty list: use at least 1"),
    "network with another key": (HEAD + TASKS + "network: {allow: [a.b], deny: [c.d]}\n", 4, 25,
                                 "unknown key 'deny': the keys here are allow"),
    "a URL as host": (HEAD + TASKS + "network: {allow: ['https://a.b/']}\n", 4, 19, "use only the host, such as"),
    "a range as host": (HEAD + TASKS + "network: {allow: [10.0.0.0/8]}\n", 4, 19, "use only the host, such as"),
    "a user in a host": (HEAD + TASKS + "network: {allow: [me@a.b]}\n", 4, 19, "it has a user name: use the form"),
    "all hosts": (HEAD + TASKS + "network: {allow: ['*']}\n", 4, 19, "'*' is not a valid host"),
    "localhost without a port": (HEAD + TASKS + "network: {allow: [a.b, localhost]}\n", 4, 24, "use localhost:PORT"),
    "hosts without a sandbox": (HEAD + TASKS + "sandbox: off\nnetwork: {allow: [a.b]}\n", 5, 10,
                                "needs a sandbox, but `sandbox: off` disables it: use `sandbox: auto`"),
    "no network without a sandbox": (HEAD + TASKS + "sandbox: off\nnetwork: off\n", 5, 10, "needs a sandbox"),
    "unknown scheme": (HEAD + TASKS + "repo: ext://x\n", 4, 7, "a URL of https"),
    "password in the URL": (HEAD + TASKS + "repo: https://me:pass@host/a/b\n", 4, 7, "has a password"),
    "remote helper": (HEAD + TASKS + "repo: 'ext::sh'\n", 4, 7, "can't be a repository"),
    "option as repo": (HEAD + TASKS + "repo: --upload-pack=x\n", 4, 7, "prefix the path with ./"),
    "no tasks": (HEAD + "tasks: []\n", 3, 8, "tasks is an empty list: add at least 1"),
    "no adapters": ("version: 1\nadapters: {}\n" + TASKS, 2, 11, "adapters is an empty mapping"),
    "tasks as mapping": (HEAD + "tasks: {a: b}\n", 3, 8, "tasks is a mapping: use a list"),
    "task as text": (HEAD + "tasks: [a]\n", 3, 9, "tasks[0] is the text 'a': use a mapping"),
    "needs as text": (HEAD + "tasks: [{id: a, prompt: p, needs: b}]\n", 3, 35, "needs is the text 'b': use a list"),
    "duplicate id": (HEAD + "tasks:\n- {id: a, prompt: p}\n- {id: a, prompt: p}\n", 5, 8, "already defined on line 4"),
    "same but for case": (HEAD + "tasks:\n- {id: a, prompt: p}\n- {id: A, prompt: p}\n", 5, 8, "only in case"),
    "self-need": (HEAD + "tasks: [{id: a, prompt: p, needs: [a]}]\n", 3, 36, "needs itself"),
    "missing need": (HEAD + "tasks: [{id: abcd, prompt: p}, {id: b, prompt: p, needs: [abce]}]\n", 3, 59,
                     "there is no task 'abce': did you mean 'abcd'?"),
    "need twice": (HEAD + "tasks: [{id: a, prompt: p}, {id: b, prompt: p, needs: [a, a]}]\n", 3, 59, "listed twice"),
    "unknown point of a need": (
        HEAD + "tasks: [{id: a, prompt: p}, {id: b, prompt: p, needs: [{task: a, at: buit}]}]\n", 3, 70,
        "at is the text 'buit': use 'built' or 'landed'"),
    "missing built need": (
        HEAD + "tasks: [{id: abcd, prompt: p}, {id: b, prompt: p, needs: [{task: abce, at: built}]}]\n", 3, 66,
        "there is no task 'abce': did you mean 'abcd'?"),
    "number as a need": (HEAD + "tasks: [{id: a, prompt: p, needs: [3]}]\n", 3, 36, "a need can't be the number 3"),
    "circle of built needs": (
        HEAD + "tasks:\n- {id: a, prompt: p, needs: [{task: b, at: built}]}\n- {id: b, prompt: p, needs: [a]}\n", 4, 37,
        "dependency cycle: a -> b -> a: remove one"),
    "circle": (HEAD + "tasks:\n- {id: a, prompt: p, needs: [b]}\n- {id: b, prompt: p, needs: [c]}\n"
               "- {id: c, prompt: p, needs: [a]}\n", 4, 30, "dependency cycle: a -> b -> c -> a: remove one"),
    "no prompt": (HEAD + "tasks: [{id: a}]\n", 3, 9, "neither prompt nor prompt_file"),
    "two prompts": (HEAD + "tasks: [{id: a, prompt: p, prompt_file: f}]\n", 3, 28, "both prompt and prompt_file"),
    "empty prompt": (HEAD + "tasks: [{id: a, prompt: ' '}]\n", 3, 25, "the prompt is empty"),
    "prompt file missing": (HEAD + "tasks: [{id: a, prompt_file: f}]\n", 3, 30, "no such file"),
    "prompt file is a folder": (HEAD + "tasks: [{id: a, prompt_file: .}]\n", 3, 30, "not a regular file"),
    "unknown adapter": (HEAD + "tasks: [{id: a, prompt: p, adapter: y}]\n", 3, 37, "'y': the adapters are x"),
    "unknown adapter like a type": (HEAD + "tasks: [{id: a, prompt: p, adapter: claude}]\n", 3, 37,
                                    "'claude': did you mean 'claude-code'?"),
    "unknown adapter, type with options": (HEAD + "tasks: [{id: a, prompt: p, adapter: comand}]\n", 3, 37,
                                           "'comand': the adapters are x"),
    "no adapter at all": ("version: 1\n" + TASKS, 1, 1, "no adapter is set: add `defaults: {adapter: NAME}`"),
    "unknown fallback": (HEAD + TASKS + "defaults: {fallback: [x, y]}\n", 4, 26, "no adapter 'y'"),
    "unknown default adapter": (HEAD + TASKS + "defaults: {adapter: y}\n", 4, 21, "no adapter 'y'"),
    "several adapters, none named": ("version: 1\nadapters:\n  x: {use: command, argv: [x]}\n"
                                     "  y: {use: command, argv: [x]}\n" + TASKS, 5, 9, "has no adapter"),
    "unknown use": ("version: 1\nadapters: {x: {use: comand}}\n" + TASKS, 2, 21, "did you mean 'command'?"),
    "unlike any use": ("version: 1\nadapters: {x: {use: zzz}}\n" + TASKS, 2, 21, "the installed ones are command"),
    "argv missing": (adapter("    env: [A]\n"), 4, 5, "the key 'argv' is missing"),
    "argv unreadable": (adapter("    argv: [x, *x]\n"), 5, 15, "aliases are not supported"),
    "argv empty": (adapter("    argv: []\n"), 5, 11, "argv is an empty list"),
    "argv as text": (adapter("    argv: fix it\n"), 5, 11, "argv is the text 'fix it': use a list"),
    "number in argv": (adapter("    argv: [x, 3]\n"), 5, 15, "argv[1] is the number 3: use text"),
    "unquoted placeholder": (adapter("    argv: [x, {prompt_file}]\n"), 5, 15, 'quote it: "{prompt_file}"'),
    "unknown placeholder": (adapter("    argv: ['{promt}']\n"), 5, 12, "{promt} is not a placeholder: use one of"),
    "unknown option": (adapter("    argv: [x]\n    agrv: [y]\n"), 6, 5, "did you mean 'argv'?"),
    "env name": (adapter("    argv: [x]\n    env: [1A]\n"), 6, 11, "'1A' is not a variable name"),
    "env key": (adapter("    argv: [x]\n    env: {COUNCIL_X: y}\n"), 6, 11, "COUNCIL_X is set by the run"),
    "env value": (adapter("    argv: [x]\n    env: {A: 1}\n"), 6, 14, "A is the number 1: use text"),
    "env form": (adapter("    argv: [x]\n    env: A\n"), 6, 10, "env is the text 'A': write a list of names"),
    "git env": (adapter("    argv: [x]\n    env: [GIT_DIR]\n"), 6, 11, "a different repository than the session's"),
    "unknown in a rule": (reading("session: id, sesion: id"), 7, 26, "did you mean 'session'?"),
    "empty in a rule": (reading("session: id, text: null"), 7, 12, "text is empty: give it a value or leave it out"),
    "rule of nothing": (reading("when: {type: end}"), 7, 12, "reads nothing: add a value such as `text`"),
    "no path in a rule": (reading("text: .type"), 7, 19, "'.type' is not a path into a line of JSON: separate names"),
    "no path in a when": (reading("when: {.x: y}, done: true"), 7, 20, "'.x' is not a path into a line of JSON"),
    "list in a when": (reading("when: {x: [y]}, done: true"), 7, 23, "expected a string, number, true or false"),
    "usage of all": (reading("cost: x, usage: all"), 7, 29, "use 'line', 'session' or 'conversation'"),
    "unknown output": (adapter("    argv: [x]\n    output: json\n"), 6, 13, "use 'text' or 'jsonl'"),
    "braces in resume": (adapter("    argv: [x]\n    resume: [{session}]\n"), 6, 14, 'quote it: "{session}"'),
    "resume of none": (adapter('    argv: [x]\n    resume: ["{session}"]\n'), 4, 5, "add a rule with `session`"),
    "max of none": (worktrees("  max: 0\n"), 5, 8, "max is the number 0: use 1 or more"),
    "max 1001": (worktrees("  max: 1001\n"), 5, 8, "use 1000 or less"),
    "bare size": (worktrees("  max_size: 20\n"), 5, 13, "a size can't be the number 20: write a whole number with a"),
    "ports 101": (worktrees("  ports: 101\n"), 5, 10, "use 100 or less"),
    "unknown in worktrees": (worktrees("  copies: [x]\n"), 5, 3, "did you mean 'copy'?"),
    "empty in worktrees": (worktrees("  max_size:\n"), 5, 12, "max_size is empty: set a value, or omit the key"),
    "worktrees' variable": (worktrees("  env: [1A]\n"), 5, 9, "'1A' is not a valid variable name"),
    "bare hooks_timeout": (worktrees("  hooks_timeout: 30\n"), 5, 18, "add its unit, such as 30s"),
    "blank command": (worktrees("  before_run: [' ']\n"), 5, 16, "a command is empty or contains a NUL"),
    "command as text": (worktrees("  teardown: make x\n"), 5, 13, "teardown is the text 'make x': use a list"),
    "blank step": (worktrees("  setup: [x, ' ']\n"), 5, 14, "a command is empty or contains a NUL"),
    "key in a step": (worktrees(f"  setup: [x, {{run: {TOKEN}}}]\n"), 5, 20, "the command seems to contain a secret"),
    "key in a command": (worktrees(f"  teardown: [x, {TOKEN}]\n"), 5, 17, "by name under `env` of `worktrees`"),
    "step of a number": (worktrees("  setup: [3]\n"), 5, 11, "a step can't be the number 3: write a shell command, or"),
    "step of nothing": (worktrees("  setup: [null]\n"), 5, 11, "setup[0] is empty: set a value"),
    "step without run": (worktrees("  setup: [{timeout: 1m}]\n"), 5, 11, "the key 'run' is missing"),
    "unknown in a step": (worktrees("  setup: [{run: x, input: [y]}]\n"), 5, 20, "did you mean 'inputs'?"),
    "empty in a step": (worktrees("  setup: [{run: x, timeout: null}]\n"), 5, 29, "timeout is empty"),
    "step's bare timeout": (worktrees("  setup: [{run: x, timeout: 5}]\n"), 5, 29, "add its unit, such as 5s"),
    "step's input": (worktrees("  setup: [{run: x, inputs: [/etc/x]}]\n"), 5, 29, "the path is absolute: write it"),
    "sparse upwards": (worktrees("  sparse: [a/../b]\n"), 5, 12, "the segment '..': write the path without it"),
    "sparse here": (worktrees("  sparse: [.]\n"), 5, 12, "the segment '.'"),
    "copy nothing": (worktrees("  copy: ['']\n"), 5, 10, "the path is empty: write the path of a file or folder"),
    "copy two slashes": (worktrees("  copy: [a//b]\n"), 5, 10, "the segment ''"),
    "copy with a backslash": (worktrees("  copy: ['a\\b']\n"), 5, 10, "contains a backslash: separate"),
    "copy with a line break": (worktrees('  copy: ["a\\nb"]\n'), 5, 10, "the character '\\n': remove it"),
    "copy a git directory": (worktrees("  copy: [libs/.GIT/config]\n"), 5, 10, "inside git's own folder"),
    "link a number": (worktrees("  link: [3]\n"), 5, 10, "link[0] is the number 3: use text"),
    "link as text": (worktrees("  link: data\n"), 5, 9, "link is the text 'data': use a list"),
    "copy and link": (worktrees("  copy: [data]\n  link: [data/]\n"), 6, 10, "'data' is already listed on line 5"),
    "link in a copy": (worktrees("  link: [a/b/c]\n  copy: [a/]\n"), 5, 10,
                       "'a/b/c' is in 'a', which is already listed on line 6"),
    "copy from a URL": (worktrees("  copy: [.env]\n", "repo: https://host/x\n"), 6, 10, "a repository by URL has none"),
    "link from a URL": (worktrees("  link: [.env]\n", "repo: host:x\n"), 6, 10, "set `repo` to the path of a clone"),
    "kept by a wildcard": (worktrees("  keep_ignored: ['*.o']\n"), 5, 18, "'*.o' has the wildcard '*': write a name"),
    "kept by an adapter": (adapter("    argv: [x]\n    keep_ignored: [/x]\n"), 6, 20, "the path is absolute"),
    "adapter's kept as text": (adapter("    argv: [x]\n    keep_ignored: x\n"), 6, 19, "keep_ignored is the text 'x'"),
    "prompt option": (adapter("    argv: [x]\n    prompt: stdn\n"), 6, 13, "use 'stdin'"),
}
# fmt: on


@pytest.mark.parametrize("name", ONE_MISTAKE)
def test_mistake_has_position_and_fix(tmp_path: Path, name: str) -> None:
    """A file with one mistake gets one message at its exact position."""
    content, line, column, fragment = ONE_MISTAKE[name]
    [(found_line, found_column, message)] = mistakes(tmp_path, content)
    assert (found_line, found_column) == (line, column), message
    assert fragment in message


MANY = """\
version: 2
capacity: "4"
capcity: 3
adapters:
  fixer: &a
    use: command
    argv: [python3, "{promt}", 3]
    env: {1A: x, OK: *a}
  other: {use: comand}
defaults: {adapter: fixr, timeout: 30}
tasks:
  - id: a
    prompt: x
    needs: [b, zz]
  - id: b
    prompt: " "
    needs: [a]
  - id: A
    prompt_file: nope.md
  - prompt: x
    prompt: y
    promt: z
"""


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    """Syntax, shape and meaning are reported together in file order."""
    found = mistakes(tmp_path, MANY)
    assert [(line, column) for line, column, _ in found] == [
        (1, 10),  # version
        (2, 11),  # capacity
        (3, 1),  # capcity
        (5, 10),  # anchor
        (7, 21),  # placeholder
        (7, 32),  # number in argv
        (8, 22),  # alias
        (9, 16),  # use
        (10, 21),  # adapter
        (10, 36),  # timeout
        (14, 13),  # circle
        (16, 13),  # empty prompt
        (18, 9),  # id differs by case only
        (19, 18),  # prompt file
        (20, 5),  # missing id
        (21, 5),  # second prompt
        (22, 5),  # promt
    ]


def test_missing_need_is_not_reported_next_to_an_unreadable_id(tmp_path: Path) -> None:
    """A need may mean the task whose own id is invalid."""
    text = HEAD + "tasks:\n- {id: 7, prompt: p}\n- {id: b, prompt: p, needs: ['7']}\n"
    assert [found[:2] for found in mistakes(tmp_path, text)] == [(4, 8)]


@pytest.mark.parametrize(
    ("data", "fragment"),
    [
        (b"x" * (1 << 20) + b"x", "larger than 1 MiB"),
        (b"\xff", "not UTF-8 (byte 0)"),
        (b" \n", "is empty"),
        (b"a\0b", "NUL"),
    ],
)
def test_prompt_file_content_is_validated(tmp_path: Path, data: bytes, fragment: str) -> None:
    """A prompt that no CLI can receive is reported where its file is named."""
    (tmp_path / "f").write_bytes(data)
    [(line, column, message)] = mistakes(tmp_path, HEAD + "tasks: [{id: a, prompt_file: f}]\n")
    assert (line, column) == (3, 30)
    assert fragment in message


def test_prompt_file_of_the_largest_size_is_accepted(tmp_path: Path) -> None:
    """The limit is one mebibyte."""
    (tmp_path / "f").write_bytes(b"x" * (1 << 20))
    path = tmp_path / "council.yaml"
    path.write_text(HEAD + "tasks: [{id: a, prompt_file: f}]\n")
    assert len(load_config(path, TYPES).tasks[0].prompt) == 1 << 20


def test_prompt_too_long_for_argv_is_reported_at_the_prompt(tmp_path: Path) -> None:
    """Found before anything runs, with both fixes."""
    (tmp_path / "f").write_bytes(b"x" * (100 * 1024 + 1))
    text = adapter("    argv: [x, '{prompt}']\n").replace("prompt: p", "prompt_file: f")
    [(line, column, message)] = mistakes(tmp_path, text)
    assert (line, column) == (6, 30)
    assert "use {prompt_file} in argv, or `prompt: stdin`" in message


def test_prompt_file_that_is_a_pipe_does_not_block(tmp_path: Path) -> None:
    """A named pipe without a writer is rejected at once."""
    os.mkfifo(tmp_path / "f")
    [(_, _, message)] = mistakes(tmp_path, HEAD + "tasks: [{id: a, prompt_file: f}]\n")
    assert "not a regular file" in message


def test_prompt_file_that_can_not_be_opened_is_reported(tmp_path: Path) -> None:
    """The error contains the reason given by the system."""
    (tmp_path / "f").symlink_to("f")
    [(_, _, message)] = mistakes(tmp_path, HEAD + "tasks: [{id: a, prompt_file: f}]\n")
    assert "too many levels of symbolic links" in message


def test_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape("nope.yaml:1:1: file not found: use an existing file")):
        load_config(tmp_path / "nope.yaml", TYPES)


def test_oversized_file_is_reported(tmp_path: Path) -> None:
    """At most 8 MiB are read."""
    [(_, _, message)] = mistakes(tmp_path, b"#" * ((8 << 20) + 1))
    assert "larger than 8 MiB" in message


def test_alias_bomb_is_not_expanded(tmp_path: Path) -> None:
    """Nested aliases, which would expand to gigabytes, are rejected one by one."""
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 10)]
    found = mistakes(tmp_path, "l0: &l0 [x]\n" + "\n".join(levels) + "\n")
    assert sum("aliases" in message for _, _, message in found) == 81
    assert sum("anchors" in message for _, _, message in found) == 10


def test_number_of_reported_mistakes_is_limited(tmp_path: Path) -> None:
    """At most ten thousand mistakes are reported."""
    assert len(mistakes(tmp_path, "a: [" + "*a," * 50_000 + "]")) == 10_000


def test_too_many_tasks_are_rejected(tmp_path: Path) -> None:
    """More than a hundred thousand tasks are rejected at the list."""
    [(line, column, message)] = mistakes(tmp_path, HEAD + "tasks:\n" + "-\n" * 100_001)
    assert (line, column) == (4, 1)
    assert "too many tasks: 100001: split them" in message


@pytest.mark.parametrize("use", ["comand", "zzz"])
def test_options_of_an_unknown_type_are_not_validated(tmp_path: Path, use: str) -> None:
    """The options of an unknown adapter type have no schema."""
    found = mistakes(tmp_path, f"version: 1\nadapters: {{x: {{use: {use}, whatever: 1}}}}\n{TASKS}")
    assert [place[:2] for place in found] == [(2, 21)]
