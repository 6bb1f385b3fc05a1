"""A fake model server for AI coding CLIs, scripted by the prompt itself.

It speaks the Anthropic Messages, OpenAI Responses, OpenAI Chat Completions, Gemini and Ollama APIs, streaming and not,
on loopback only. Lines of the prompt that are directives count; all others are ignored:

    write PATH TEXT            call the CLI's own tool that writes a file (one line with a newline)
    run COMMAND                call its shell tool
    say TEXT                   the final answer; by default "Done."
    fail STATUS [TIMES [SECONDS]]   answer the first TIMES requests (by default all) with this HTTP status and the
                               API's own error, with SECONDS as `retry-after`
    drop [TIMES]               close the connection in the middle of an answer
    delay SECONDS              wait before each answer
    usage INPUT OUTPUT         the token usage of each answer

Each model turn executes one `write` or `run`, found by counting the tool results after the prompt, so any number of
conversations may run concurrently. Only `fail` and `drop` are counted in the server, by the text of the prompt.
A client without tools, like aider or the Ollama bridge, gets all files as text in the format it asks for.
"""

from tests.model_server.conversation import DialectName
from tests.model_server.server import ModelServer, RecordedRequest

__all__ = ["DialectName", "ModelServer", "RecordedRequest"]
