"""Describe a run with typed objects instead of a file: one task per module.

    python examples/typed_run.py        (in a git repository with a branch `main`)

Numbers are seconds or bytes; text such as "30m" and "50MB" is allowed as in a file. Error messages include the
location, such as `tasks[0].needs[0]`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import anyio

from adapters.command.options import CommandOptions
from orchestrator import AdapterSettings, Backoff, Config, Council, Task, TaskSettings

WRITE_TEST = """\
mkdir -p tests
printf 'import %s\\n\\n\\ndef test_import() -> None:\\n    assert %s\\n' {name} {name} > tests/test_{name}.py
"""


def describe(modules: list[str]) -> Config:
    """Return a run with a task for each module, and a last one that needs all of them."""
    shell = CommandOptions(argv=("sh", "{prompt_file}"))  # any program; these are its options
    tasks = [
        Task(id=f"test-{name}", prompt=WRITE_TEST.format(name=name), owns=(f"tests/test_{name}.py",))
        for name in modules
    ]
    index = Task(
        id="index",
        prompt="mkdir -p tests && ls tests > tests/INDEX",
        needs=tuple(task.id for task in tasks),
        priority=10,
    )
    return Config(
        version=1,
        base="main",
        capacity=2,
        adapters={"shell": AdapterSettings.of("command", shell, capacity=2)},
        defaults=TaskSettings(timeout=60.0, attempts=2, backoff=Backoff(initial=0.2, max=5.0)),
        tasks=(*tasks, index),
    )


async def main(modules: list[str]) -> int:
    """Run the tasks in the repository of the current folder."""
    async with Council.open(describe(modules)) as council:
        report = await council.runs.run()
    print(f"{report.status}: {sum(task.landed is not None for task in report.tasks)} landed on {report.target}")
    return report.exit_code


if __name__ == "__main__":
    sys.exit(anyio.run(main, sorted(path.stem for path in Path().glob("*.py"))))
