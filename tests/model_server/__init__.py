"""A server that stands in for the models behind AI coding CLIs: it answers by a script that the prompt itself holds.

It speaks the Anthropic Messages, OpenAI Responses, OpenAI Chat Completions, Gemini and Ollama APIs, streaming and not,
on loopback alone. Each line of the prompt that is a directive counts; all others mean nothing:

    write PATH TEXT            call the CLI's own tool that writes a file (one line, with a line end)
    run COMMAND                call its shell tool
    say TEXT                   say this at the end; without any, "Done."
    fail STATUS [TIMES [SECONDS]]   answer the first TIMES requests (without: all) with this HTTP status and the
                               API's own error, with SECONDS as `retry-after`
    drop [TIMES]               break the answer off in the middle
    delay SECONDS              wait before each answer
    usage INPUT OUTPUT         the tokens that each answer says

Each turn of the model does one `write` or `run`, found by counting the tool results after the prompt, so any number
of conversations can go on at once. Only `fail` and `drop` are counted in the server, by the text of the prompt.
A client without tools, as aider or the Ollama bridge, gets all files in words, in the form that it asks for.
"""

from tests.model_server.conversation import DialectName
from tests.model_server.server import ModelServer, RecordedRequest

__all__ = ["DialectName", "ModelServer", "RecordedRequest"]
