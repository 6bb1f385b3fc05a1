"""Draw `docs/council.svg`: the table of a real run at a point with varied task states.

    python docs/picture.py [FILE]

The run uses the fake CLI in a temporary folder, which is removed afterwards.
"""

# ruff: noqa: INP001, S607 - a script for people, which runs git by name

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anyio
from rich.console import Console
from rich.segment import SegmentLines

import orchestrator.testing.fake_cli
from orchestrator.api.council import Council
from orchestrator.cli.live.model import LiveRun
from orchestrator.cli.render.rich_tables import frame_lines
from orchestrator.cli.render.table_model import TableFrame

WIDTH, ROOM = 106, 10
FAKE_CLI = Path(orchestrator.testing.fake_cli.__file__)
TASKS = [
    {"id": "models", "prompt": "write src/models.py class User:\nappend src/models.py     name: str"},
    {"id": "readme", "prompt": "write README.md # Shop"},
    {"id": "badge", "prompt": "tick 3 0.4\nwrite README.md # Project, tested"},
    {
        "id": "api",
        "needs": ["models"],
        "prompt": "attempt 1 exit 1\nwrite src/api.py def users():\nappend src/api.py     return all_of(User)\n"
        "print The handlers for /users are written, now their tests\nhang",
    },
    {
        "id": "search",
        "needs": ["models"],
        "prompt": "discard src/legacy_search.py\nwrite src/search.py def search(words):\n"
        "print src/legacy_search.py is not used any more, so I remove it\nhang",
    },
    {
        "id": "forms",
        "needs": ["models"],
        "checks": ["sleep 60"],
        "prompt": "write src/forms.py class SignUp:\ntick 6 0.4\nprint Sign-up checks the e-mail address",
    },
    {"id": "release", "needs": ["api", "search"], "prompt": "write CHANGES.md 1.0"},
]
#: The state to wait for: the phase of each task, and the tasks with visible messages and changes.
PHASES = {
    "models": "landed",
    "readme": "landed",
    "badge": "conflict",
    "api": "build",
    "search": "build",
    "forms": "checks",
    "release": "waiting",
}
TALKING = {"api", "search"}
CHANGED = set(PHASES) - {"release"}
TITLE = "council run council.yaml"
#: Like rich's own template, but with local fonts only.
TEMPLATE = """\
<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: "Fira Code", "DejaVu Sans Mono", Menlo, Consolas, monospace;
  font-size: {char_height}px; line-height: {line_height}px; }}
.{unique_id}-title {{ font-family: Arial, "DejaVu Sans", sans-serif; font-size: 18px; font-weight: bold; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def main() -> None:
    """Run the tasks, and write the picture."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("council.svg")
    with tempfile.TemporaryDirectory(prefix="council-picture-") as scratch:
        environ = {
            "PATH": os.environ["PATH"],
            "HOME": scratch,
            "COUNCIL_HOME": str(Path(scratch, "home")),
            "GIT_CONFIG_GLOBAL": os.devnull,
        }
        frame = anyio.run(catch, prepare(Path(scratch), environ), environ)
    target.write_text(draw(frame), encoding="utf-8")


def prepare(scratch: Path, environ: dict[str, str]) -> Path:
    """Create a repository and the file of a run; return the path of the file."""
    repository = scratch / "shop"
    (repository / "src").mkdir(parents=True)
    (repository / "README.md").write_text("# Project\n")
    (repository / "src" / "legacy_search.py").write_text("import re\n" * 48)
    identity = ["-c", "user.name=User", "-c", "user.email=user@example.org"]
    for command in (["init", "-q", "-b", "main"], ["add", "."], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *command], cwd=repository, env=environ, check=True)
    config = {
        "version": 1,
        "repo": str(repository),
        "target": "main",
        "capacity": 4,
        "readable": [sys.prefix, str(FAKE_CLI.parents[2])],
        "adapters": {"fake": {"use": "command", "argv": [sys.executable, "-S", str(FAKE_CLI), "{prompt_file}"]}},
        "defaults": {"backoff": {"initial": "200ms", "jitter": False}},
        "tasks": TASKS,
    }
    path = scratch / "council.yaml"
    path.write_text(json.dumps(config))
    return path


async def catch(config: Path, environ: dict[str, str]) -> TableFrame:
    """Run the file until the table is suitable; return its frame."""
    async with Council.open(config, environ=environ) as council:
        run = await council.create_run()
        activity = await council.activity(run)
        view = LiveRun(activity.record, activity.attempts)

        async def follow() -> None:
            async for record in council.records(activity.position):
                view.apply(record)

        async with anyio.create_task_group() as showing:
            showing.start_soon(activity.show, view)
            showing.start_soon(follow)
            async with anyio.create_task_group() as running:
                running.start_soon(council.resume, run)
                try:
                    with anyio.fail_after(90):
                        while not is_telling(frame := view.frame(time.time(), ROOM)):  # noqa: ASYNC110
                            await anyio.sleep(0.1)
                finally:
                    council.stop()
            showing.cancel_scope.cancel()
    return frame


def is_telling(frame: TableFrame) -> bool:
    """Return True if the frame shows the expected phases, messages and changes."""
    rows = {row.task: row for row in frame.rows}
    talk = all(rows[task].words for task in TALKING)
    return (
        talk
        and {task: row.phase for task, row in rows.items()} == PHASES
        and all(rows[task].changes.files for task in CHANGED)
    )


def draw(frame: TableFrame) -> str:
    """Return the picture."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(SegmentLines(frame_lines(frame, WIDTH), new_lines=True))
    return console.export_svg(title=TITLE, code_format=TEMPLATE, unique_id="council")


if __name__ == "__main__":
    main()
