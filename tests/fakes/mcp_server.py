"""A server of the Model Context Protocol with one tool, on stdin and stdout: `mcp_server.py LOG`.

It writes the value of LOOKUP_TOKEN and then each request to LOG.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

TOOL = {"name": "lookup", "description": "Looks something up.", "inputSchema": {"type": "object", "properties": {}}}


def answer(method: str, params: dict[str, Any]) -> dict[str, Any] | None:
    """Return the result of a request; None for an unknown one."""
    match method:
        case "initialize":
            reported = {"name": "lookup", "version": "1"}
            return {"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}}, "serverInfo": reported}
        case "tools/list":
            return {"tools": [TOOL]}
        case "ping":
            return {}
        case _:
            return None


def main() -> None:
    """Answer until the input ends."""
    with Path(sys.argv[1]).open("a", buffering=1) as log:
        log.write(f"{os.environ.get('LOOKUP_TOKEN', 'no token')}\n")
        for line in sys.stdin:
            asked = json.loads(line)
            log.write(f"{asked.get('method')}\n")
            if "id" not in asked or "method" not in asked:
                continue
            result = answer(asked["method"], asked.get("params") or {})
            said = {"error": {"code": -32601, "message": "not known"}} if result is None else {"result": result}
            sys.stdout.write(json.dumps({"jsonrpc": "2.0", "id": asked["id"], **said}) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
