"""Real distributions for tests: a module and its metadata in a folder, as installed."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

REGISTER = """
import pluggy

hookimpl = pluggy.HookimplMarker("cli_council")
"""

#: Registers a type under a name.
REGISTERS = """
@hookimpl
def council_register_{kind}(register):
    register({name!r}, {type})
"""

#: A complete adapter type, which runs the program named by its option.
ADAPTER = (
    REGISTER
    + """
from pydantic import BaseModel, ConfigDict
from orchestrator.protocols import SessionCommand


class Echo:
    class Options(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
        text: str = "hello"

    def __init__(self, options):
        self.options = options

    def capabilities(self):
        return frozenset()

    def programs(self):
        return ()

    def command(self, request):
        return SessionCommand(["sh", "-c", f"echo {self.options.text} > echo.txt"])

    def parse(self, line):
        return ()

    def verdict(self, end):
        return None
"""
)


def install(folder: Path, name: str, code: str, *, entry: str | None = None, module: str | None = None) -> Path:
    """Install a distribution of one module with one entry point into a folder; return the module's file."""
    module = module or name.replace("-", "_")
    information = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[cli_council]\n{entry or name} = {module}\n")
    path = folder / f"{module}.py"
    path.write_text(dedent(code))
    return path
