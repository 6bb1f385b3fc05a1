"""The contract of `use: command` with all options, and with recorded output of real CLIs."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import yaml

from adapters.command.adapter import CommandAdapter
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.protocols import AgentMessage, ConversationStarted, FinalResult, UsageReport
from orchestrator.testing.adapter_contract import AdapterContract, ExpectedResult
from tests.contract.verdicts import SESSION, TRANSCRIPTS, end


class TestEverything(AdapterContract):
    """All options at once, arguments in the middle, long texts in files."""

    adapter_type = CommandAdapter
    options: ClassVar[dict[str, Any]] = {
        "argv": ["tool", "{options}", "--model", "{model}", "--data", "{home}", "--", "{prompt_file}"],
        "model": "big",
        "home": "own",
        "resume": ["resume", "{session}"],
        "read_only": ["--mode", "look"],
        "read_write": ["--mode", "edit"],
        "instructions": ["--system", "{instructions_file}"],
        "mcp": ["--mcp", "{mcp_file}"],
        "output": "jsonl",
        "read": [{"session": "id"}, {"match": "^the end$", "done": True}],
        "failures": {"rate_limited": r"again in (?P<seconds>\d+) s"},
    }
    lines: ClassVar = (
        ('{"id": "s1"}', (ConversationStarted("s1"),)),
        ("the end", (FinalResult(),)),
        ("words", (AgentMessage("words"),)),
    )
    ends: ClassVar = ((end("words", 0), FailureClass.CRASHED), (end("the end", 0), None), (end("words"), None))


class TestInArguments(AdapterContract):
    """Instructions as an argument, each option alone; the home is the user's."""

    adapter_type = CommandAdapter
    options: ClassVar = {
        "argv": ["tool"],
        "prompt": "stdin",
        "home": "shared",
        "resume": ["--resume={session}"],
        "instructions": ["--system", "{instructions}"],
        "read": [{"match": r"^id (?P<session>\S+)"}],
    }


class TestCodexFromYaml(AdapterContract):
    """Everything the Codex adapter reads can be configured in YAML, except for tool names."""

    adapter_type = CommandAdapter
    options: ClassVar = yaml.safe_load(r"""
        argv: [codex, exec, "{options}", --json, --skip-git-repo-check, --model, "{model}", "-"]
        prompt: stdin
        model: gpt-5.5
        home: own
        resume: [resume, "{session}"]
        output: jsonl
        read:
          - session: thread_id
          - when: {type: item.completed, item.type: agent_message}
            text: item.text
          - when: {type: turn.completed}
            input_tokens: usage.input_tokens
            output_tokens: usage.output_tokens
            cached_tokens: usage.cached_input_tokens
            usage: conversation
            done: true
          - when: {type: turn.failed}
            error: error.message
          - when: {type: turn.failed}
            match: 'status:? (?P<status>[0-9]{3})'
        failures:
          auth: missing environment variable
          overloaded: experiencing high demand
          transient: stream disconnected
          invalid: invalid_request_error|initialize in-process
          refused: patch rejected
    """)
    lines: ClassVar = (
        (json.dumps({"type": "thread.started", "thread_id": SESSION}), (ConversationStarted(SESSION),)),
        ('{"type":"turn.started"}', ()),
        (
            '{"type":"turn.completed","usage":{"input_tokens":120,"cached_input_tokens":100,"output_tokens":34}}',
            (
                UsageReport(120, 34, is_cumulative=True, cached_tokens=100, model="gpt-5.5", includes_resumed=True),
                FinalResult(),
            ),
        ),
    )
    transcripts = TRANSCRIPTS / "codex"
    recorded: ClassVar = {
        "edit": ExpectedResult(
            session="01a20367-e977-74a0-a6b2-e9a9a51bad2e", text="It is written.", tokens=(2 * 120, 2 * 34)
        ),
        "resumed": ExpectedResult(text="Both are there.", tokens=(2 * 120 + 2 * 20, 2 * 34 + 2 * 4)),
        "read-only": ExpectedResult(FailureClass.REFUSED, text="It is looked at."),
        "tool": ExpectedResult(text="Both done."),
        "denied": ExpectedResult(text="Tried."),
        "limited": ExpectedResult(FailureClass.RATE_LIMITED),
        "limited-then-well": ExpectedResult(text="Done."),
        "no-login": ExpectedResult(FailureClass.AUTH),
        "no-key": ExpectedResult(FailureClass.AUTH),
        "server-error": ExpectedResult(FailureClass.OVERLOADED),
        "overloaded": ExpectedResult(FailureClass.OVERLOADED),
        "dead-server": ExpectedResult(),
        "broken-stream": ExpectedResult(FailureClass.TRANSIENT),
        "invalid": ExpectedResult(FailureClass.INVALID),
        "unwritable": ExpectedResult(FailureClass.INVALID),
        "refused": ExpectedResult(FailureClass.REFUSED),
        "interrupted": ExpectedResult(),
        "terminated": ExpectedResult(),
    }


class TestOpencodeFromYaml(AdapterContract):
    """The same for opencode, which reports usage per step."""

    adapter_type = CommandAdapter
    options: ClassVar = yaml.safe_load(r"""
        argv: [opencode, run, --format, json, --auto, --print-logs, --log-level, ERROR]
        prompt: stdin
        home: own
        resume: [--session, "{session}"]
        read_only: [--agent, plan]
        output: jsonl
        read:
          - session: sessionID
          - when: {type: text}
            text: part.text
          - when: {type: step_finish}
            input_tokens: part.tokens.input + part.tokens.cache.read + part.tokens.cache.write
            output_tokens: part.tokens.output + part.tokens.reasoning
            cached_tokens: part.tokens.cache.read
            cost: part.cost
          - when: {type: step_finish, part.reason: stop}
            done: true
          - when: {type: error}
            error: error.data.message
            status: error.data.statusCode
        failures:
          transient: unable to connect|connection reset
          invalid: model not found|EACCES|EPERM|ENOTDIR
    """)
    lines: ClassVar = (
        (
            json.dumps(
                {
                    "type": "step_finish",
                    "part": {
                        "reason": "stop",
                        "cost": 0.25,
                        "tokens": {"input": 1, "output": 4, "reasoning": 50, "cache": {"read": 300, "write": 20}},
                    },
                }
            ),
            (UsageReport(321, 54, 0.25, cached_tokens=300), FinalResult()),
        ),
    )
    transcripts = TRANSCRIPTS / "opencode"
    recorded: ClassVar = {
        "edit": ExpectedResult(
            session="ses_dfc986321ffeZTBadsNvnjbr3u", text="It is written.", tokens=(2 * 120, 2 * 34)
        ),
        "resumed": ExpectedResult(text="Both are there.", tokens=(2 * 20, 2 * 4)),
        "read-only": ExpectedResult(text="It is looked at."),
        "tool": ExpectedResult(text="Both done."),
        "limited": ExpectedResult(FailureClass.RATE_LIMITED, tokens=(0, 0)),
        "limited-for-long": ExpectedResult(),  # without the plugin of the bundled adapter
        "limited-until": ExpectedResult(FailureClass.RATE_LIMITED),
        "limited-then-well": ExpectedResult(text="Done."),
        "no-login": ExpectedResult(FailureClass.AUTH),
        "server-error": ExpectedResult(FailureClass.OVERLOADED),
        "overloaded": ExpectedResult(FailureClass.OVERLOADED),
        "dead-server": ExpectedResult(FailureClass.TRANSIENT),
        "broken-stream": ExpectedResult(FailureClass.TRANSIENT),
        "invalid": ExpectedResult(FailureClass.INVALID),
        "unknown-model": ExpectedResult(FailureClass.INVALID),
        "unwritable": ExpectedResult(FailureClass.INVALID),
        "refused": ExpectedResult(text="It is not written."),
        "interrupted": ExpectedResult(),
        "terminated": ExpectedResult(),
    }
