"""Write the table of profiles in `docs/adapters.md` from the profiles.

    python docs/profiles.py [--check]

With `--check` the exit code is 1 if the page differs from the profiles.
"""

# ruff: noqa: INP001, S101  a script

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from adapters.command.profile import ProfileAdapter
from orchestrator.config.profiles import ProfileAdapterType
from orchestrator.plugins import load_plugins

PAGE = Path(__file__).parent / "adapters.md"
START, END = "<!-- profiles -->\n", "<!-- end -->"


def rows() -> Iterator[str]:
    """Yield the lines of the table."""
    yield "| profile | install | verified with | optional features | variables, in addition to `HOME` |"
    yield "|---|---|---|---|---|"
    for name, adapter_type in sorted(load_plugins({"COUNCIL_PLUGINS": ""}).adapters.items()):
        if isinstance(adapter_type, ProfileAdapterType):
            adapter = adapter_type(adapter_type.Options())
            assert isinstance(adapter, ProfileAdapter)
            profile = adapter.profile
            verified = ", ".join(profile.verified) or "unverified"
            can = [str(one).replace("_", "-") for one in adapter.capabilities()]
            features = ", ".join(sorted([*can, *(["acp"] if profile.acp else [])])) or "none"
            passed = profile.variables(profile.keys)[1]
            variables = ", ".join(f"`{one}`" for one in passed) or "none"
            install = profile.install.replace("|", "\\|")
            yield f"| [`{name}`]({profile.docs}) | `{install}` | {verified} | {features} | {variables} |"


def rendered(page: str) -> str:
    """Return the page with the table written again."""
    head, rest = page.split(START)
    return head + START + "\n".join(rows()) + "\n" + rest[rest.index(END) :]


def main() -> int:
    """Write the page, or check it."""
    page = PAGE.read_text()
    if "--check" in sys.argv:
        return int(rendered(page) != page)
    PAGE.write_text(rendered(page))
    return 0


if __name__ == "__main__":
    sys.exit(main())
