"""A fake aider 0.86: `aider --message-file FILE --yes-always …`, which always exits with 0.

Steps: `write PATH TEXT`, `fail auth|limit|context`, `stumble` (a transient error).
"""

# ruff: noqa: T201  a program that prints

from __future__ import annotations

import sys
from pathlib import Path

from tests.fakes.script import steps, write

AUTH = "litellm.AuthenticationError: AuthenticationError: OpenAIException - Incorrect API key provided: x."
LIMIT = "litellm.RateLimitError: RateLimitError: OpenAIException - stub says rate_limit_error"


def main() -> None:
    assert {"--no-auto-commits", "--yes-always"} <= set(sys.argv), sys.argv
    print("Aider v0.86.1\nMain model: openai/stub with diff edit format\n")
    # Created by repomap.py at the top of the repository.
    write(".aider.tags.cache.v4/cache.db", "cache")
    for word, first, rest in steps(Path(sys.argv[sys.argv.index("--message-file") + 1]).read_text()):
        match word, first:
            case "write", _:
                write(first, rest)
                print(f"{first}\n\nTokens: 4.2k sent, 1.1k received. Cost: $0.01 message, $0.02 session.")
                print(f"Applied edit to {first}", flush=True)
            case "stumble", _:
                print(f"{LIMIT}\nThe API provider has rate limited you. Try again later or check your quotas.")
                print("Retrying in 0.2 seconds...")
            case "fail", "auth":
                print(f"{AUTH}\nThe API provider is not able to authenticate you. Check your API key.")
                return
            case "fail", "limit":
                print(f"{LIMIT}\nThe API provider has rate limited you. Try again later or check your quotas.")
                return
            case "fail", "context":
                print("Tokens: 9k sent, 0 received.\n\nModel openai/stub has hit a token limit!")
                return


if __name__ == "__main__":
    main()
