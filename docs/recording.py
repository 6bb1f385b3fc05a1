"""Record `docs/recording.svg`: the table of a real run, as an animation.

    python docs/recording.py [FILE]

The run uses the fake CLI in a temporary folder, which is removed afterwards.
"""

# ruff: noqa: INP001, S607 - a script for developers, which runs git by name

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import anyio
from rich.console import Console
from rich.segment import Segment, SegmentLines

from orchestrator.api.council import Council
from orchestrator.cli.live.model import LiveRun
from orchestrator.cli.render.rich_tables import frame_lines
from orchestrator.cli.render.table_model import TableFrame

WIDTH, ROWS = 106, 10
#: Seconds between two frames, and the seconds for which the last one is shown.
INTERVAL, LAST = 0.4, 5.0
FAKE_CLI = Path(__file__).parents[1] / "tests" / "fake_cli.py"
TASKS = [
    {
        "id": "models",
        "prompt": "print I read the database schema first\npause 0.8\nwrite src/models.py class User:\n"
        "append src/models.py     name: str\nprint User has a name, now the tests\npause 0.8",
    },
    {"id": "readme", "prompt": "write README.md # Shop\nprint The title is the shop's name\npause 0.6"},
    {
        "id": "badge",
        "prompt": "print Which build service?\npause 1.2\nwrite README.md # Project, tested\npause 1",
    },
    {
        "id": "api",
        "needs": ["models"],
        "prompt": "attempt 1 print Connection lost\nattempt 1 pause 0.8\nattempt 1 exit 1\n"
        "write src/api.py def users():\nappend src/api.py     return all_of(User)\n"
        "print The handlers for /users are written, now their tests\npause 1.8\n"
        "write tests/test_api.py def test_users(): ...",
    },
    {
        "id": "search",
        "needs": ["models"],
        "prompt": "write src/search.py def search(query):\nprint The index is next\npause 1.2\n"
        "discard src/legacy_search.py\nprint src/legacy_search.py is no longer used, so I remove it\npause 1.8",
    },
    {
        "id": "forms",
        "needs": ["models"],
        "checks": ["sleep 1.5"],
        "prompt": "write src/forms.py class SignUp:\nprint Sign-up checks the e-mail address\npause 1.8",
    },
    {
        "id": "release",
        "needs": ["api", "search"],
        "prompt": "print Six changes\npause 1\nwrite CHANGES.md 1.0",
    },
]
TITLE = "council run council.yaml"
#: Like rich's own template, with local fonts only. Each frame is visible for its share of the loop; a viewer without
#: animation shows the last one.
TEMPLATE = """\
<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.matrix {{ font-family: "Fira Code", "DejaVu Sans Mono", Menlo, Consolas, monospace;
  font-size: {char_height}px; line-height: {line_height}px; }}
.{unique_id}-title {{ font-family: Arial, "DejaVu Sans", sans-serif; font-size: 18px; font-weight: bold; }}
</style>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" class="matrix">
FRAMES
</g>
</svg>
"""
FRAME = """\
<g visibility="VISIBILITY">
<animate attributeName="visibility" calcMode="discrete" dur="DURATIONs" repeatCount="indefinite" VALUES/>
<style>{styles}</style>
<defs>{lines}</defs>
{backgrounds}{matrix}
</g>
"""


def main() -> None:
    """Run the tasks, and write the animation."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("recording.svg")
    with tempfile.TemporaryDirectory(prefix="council-recording-") as scratch:
        environ = {
            "PATH": os.environ["PATH"],
            "HOME": scratch,
            "COUNCIL_HOME": str(Path(scratch, "home")),
            "GIT_CONFIG_GLOBAL": os.devnull,
        }
        frames = anyio.run(record, prepare(Path(scratch), environ), environ)
    target.write_text(draw(frames), encoding="utf-8")


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
        "readable": [sys.prefix, str(FAKE_CLI.parents[1])],
        "adapters": {"fake": {"use": "command", "argv": [sys.executable, "-S", str(FAKE_CLI), "{prompt_file}"]}},
        "defaults": {"backoff": {"initial": "200ms", "jitter": False}},
        "tasks": TASKS,
    }
    path = scratch / "council.yaml"
    path.write_text(json.dumps(config))
    return path


async def record(config: Path, environ: dict[str, str]) -> list[tuple[float, TableFrame]]:
    """Run the file; return its distinct frames, each with its second of the run."""
    frames: list[tuple[float, TableFrame]] = []
    async with Council.open(config, environ=environ) as council:
        run = await council.runs.create()
        activity = await council.sessions.activity(run)
        view = LiveRun(activity.record, activity.attempts)
        start = time.time()

        def take() -> None:
            frame = view.frame(time.time(), ROWS)
            if not frames or frames[-1][1] != frame:
                frames.append((time.time() - start, frame))

        async def follow() -> None:
            async for commit in council.history.follow(activity.position):
                view.apply(commit)

        async def sample() -> None:
            while True:
                take()
                await anyio.sleep(INTERVAL)

        async with anyio.create_task_group() as showing:
            for show in (lambda: activity.show(view.activity), follow, sample):
                showing.start_soon(show)
            with anyio.fail_after(90):
                await council.runs.resume(run)
            await anyio.sleep(INTERVAL)
            take()
            showing.cancel_scope.cancel()
    return frames


def draw(frames: Sequence[tuple[float, TableFrame]]) -> str:
    """Return the animation."""
    texts = [frame_lines(frame, WIDTH) for _, frame in frames]
    height = max(map(len, texts))
    starts = [second for second, _ in frames]
    duration = starts[-1] + LAST
    groups = []
    for number, (text, (start, end)) in enumerate(zip(texts, pairwise([*starts, duration]), strict=True)):
        is_last = number == len(texts) - 1
        values = f'values="hidden;visible;hidden" keyTimes="0;{start / duration:.4f};{end / duration:.4f}"'
        if number == 0:
            values = f'values="visible;hidden" keyTimes="0;{end / duration:.4f}"'
        elif is_last:
            values = f'values="hidden;visible" keyTimes="0;{start / duration:.4f}"'
        group = _export(text, height, FRAME, f"f{number}")
        group = group.replace("VISIBILITY", "visible" if is_last else "hidden").replace("VALUES", values)
        groups.append(group.replace("DURATION", f"{duration:.1f}"))
    return _export(texts[-1], height, TEMPLATE, "council").replace("FRAMES", "".join(groups))


def _export(lines: Sequence[list[Segment]], height: int, template: str, unique_id: str) -> str:
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    padding: list[list[Segment]] = [[]] * (height - len(lines))
    console.print(SegmentLines([*lines, *padding], new_lines=True))
    return console.export_svg(title=TITLE, code_format=template, unique_id=unique_id)


if __name__ == "__main__":
    main()
