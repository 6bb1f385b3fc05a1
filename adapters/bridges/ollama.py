"""Run a task in a worktree with an Ollama model; print events as JSON lines.

    python3 -P ollama.py --host URL --model M --prompt-file FILE --worktree FOLDER --context TOKENS [OPTION]...
    python3 -P ollama.py --host URL --model M --ready

The model has no tools: the prompt contains the files, and its response is applied completely or not at all.
`--ready` checks the client, the server and the model.

--instructions-file FILE    instructions before the files and the task
--read-only                 the model responds in prose, nothing is applied

If the server stays unreachable for a few seconds, a user must start it: the adapter is disabled (`auth`), so that its
tasks wait without losing attempts. An interrupted response is retried (`transient`).
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from adapters.bridges.context import describe_worktree
from adapters.bridges.http_status import failure_name_for_status
from adapters.bridges.lines import BridgeExit, MessageBuffer, write_line
from adapters.bridges.response import (
    EDIT_INSTRUCTIONS,
    READ_ONLY_INSTRUCTIONS,
    UnusableResponseError,
    apply_response,
    parse_response,
)
from adapters.bridges.worktree import ConfinedWorktree, OutsideWorktreeError

try:
    import httpx
    import ollama
except ImportError:
    _MISSING = BridgeExit("the client of Ollama is missing: pip install 'cli-council[ollama]'", "invalid")
    sys.exit(_MISSING.report(plain="--ready" in sys.argv))

_PATIENCE: Final = 5.0  # seconds to wait for a server that is starting
_CONNECTING: Final = 10.0  # seconds
_BYTES_A_TOKEN: Final = 3  # of source code, a conservative estimate


def _client(host: str) -> ollama.Client:
    return ollama.Client(host=host, timeout=httpx.Timeout(None, connect=_CONNECTING))


def _unreachable(host: str, error: Exception) -> BridgeExit:
    remedy = "start it with `ollama serve`, or correct `host`; with `network: off` no session reaches it"
    return BridgeExit(f"no Ollama server responds at {host} ({error}): {remedy}", "auth")


def _rejected(error: ollama.ResponseError, model: str) -> BridgeExit:
    message = " ".join(str(error.error).split())[:300]
    status = error.status_code
    if status == 404:
        return BridgeExit(f"the server does not have the model {model!r} ({message}): `ollama pull {model}`", "invalid")
    if "the context length" in message:
        return BridgeExit(f"the server reports: {message}: lower `context`, to send less", "limit")
    failure = failure_name_for_status(status) or "transient"  # no status: the error was in the middle of a response
    remedy = ": set OLLAMA_API_KEY, or log in with `ollama signin`" if failure == "auth" else ""
    return BridgeExit(f"the server reports: {message}{f' ({status})' if status > 0 else ''}{remedy}", failure)


def _answer(host: str, model: str, messages: Sequence[Mapping[str, str]], context: int) -> str:
    """Print and return the model's response. Raises BridgeExit if it is incomplete."""
    words = MessageBuffer()
    client = _client(host)
    began = time.monotonic()
    while True:
        try:
            parts = client.chat(model=model, messages=messages, stream=True, options={"num_ctx": context})
            return _read(parts, words)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            if time.monotonic() - began > _PATIENCE:
                raise _unreachable(host, error) from None
            write_line("warned", text=f"no Ollama server responds at {host}, retrying")
            time.sleep(1)
        except ollama.ResponseError as error:
            raise _rejected(error, model) from None
        except (httpx.HTTPError, ValueError) as error:
            words.flush()
            raise BridgeExit(
                f"the server interrupted its response: {str(error) or type(error).__name__}", "transient"
            ) from None


def _read(parts: Iterator[ollama.ChatResponse], words: MessageBuffer) -> str:
    for part in parts:
        words.add(part.message.content or "")
        if part.done:
            text = words.flush()
            sent, received = part.prompt_eval_count or 0, part.eval_count or 0
            write_line("spent", input_tokens=sent, output_tokens=received, cost=None)
            if part.done_reason == "length":
                raise BridgeExit("the response does not fit into the model's context: raise `context`", "limit")
            return text
    words.flush()
    raise BridgeExit("the server interrupted its response", "transient")


def _perform(options: argparse.Namespace) -> BridgeExit:
    worktree = ConfinedWorktree(options.worktree)
    prompt = options.prompt_file.read_text(encoding="utf-8")
    instructions = READ_ONLY_INSTRUCTIONS if options.read_only else EDIT_INSTRUCTIONS
    more = "" if options.instructions_file is None else options.instructions_file.read_text(encoding="utf-8")
    try:
        # Half of the context is for the request, half for the response. Servers truncate silently.
        budget = options.context * _BYTES_A_TOKEN // 2 - len(prompt.encode()) - len(more.encode())
        if budget < 0:
            return BridgeExit("the prompt takes more than half of the model's context: raise `context`", "limit")
        shown = describe_worktree(worktree, prompt, budget)
        messages = (
            # In one message, because a model's template may allow only one.
            {"role": "system", "content": f"{instructions}\n{more}" if more else instructions},
            {"role": "user", "content": f"{shown}\nThe task:\n\n{prompt}"},
        )
        text = _answer(options.host, options.model, messages, options.context)
        changed = () if options.read_only else apply_response(parse_response(text), worktree)
    except BridgeExit as concluded:
        return concluded
    except (OSError, subprocess.CalledProcessError) as error:
        return BridgeExit(f"the worktree can't be read: {error}", "crashed")
    except OutsideWorktreeError as error:
        return BridgeExit(f"nothing of the response was applied: {error}", "refused")
    except UnusableResponseError as error:
        return BridgeExit(f"nothing of the response was applied: {error}", "crashed")
    for path in changed:
        write_line("tool", name="edit", detail=path, paths=[path], call=None, diff=None)
    return BridgeExit("")


def _ready(host: str, model: str) -> BridgeExit:
    try:
        _client(host).show(model)
    except (ConnectionError, httpx.HTTPError) as error:
        return _unreachable(host, error)
    except ollama.ResponseError as error:
        return _rejected(error, model)
    except ValueError as error:
        return BridgeExit(f"no Ollama server runs at {host} ({str(error)[:100]}): correct `host`", "invalid")
    return BridgeExit("ready")


def main() -> int:
    """Perform one task; return 0 if the response was applied, otherwise 1."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--host", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt-file", type=Path)
    parser.add_argument("--worktree", type=Path)
    parser.add_argument("--context", type=int)
    parser.add_argument("--instructions-file", type=Path)
    parser.add_argument("--read-only", action="store_true")
    parser.add_argument("--ready", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end immediately, without unwinding the client
    if options.ready:
        return _ready(options.host, options.model).report(plain=True)
    return _perform(options).report()


if __name__ == "__main__":
    sys.exit(main())
