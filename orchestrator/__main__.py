"""The `council` command. Session commands import nothing but their client."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and not sys.flags.safe_path and sys.path[0] != os.path.dirname(os.path.dirname(__file__)):  # noqa: PTH120
    # `python -m` adds the current folder: a repository may have its own `json.py` or `adapters`.
    del sys.path[0]


def main() -> None:
    """Run `council` with the arguments of this process, and exit."""
    try:
        _run()
    except KeyboardInterrupt:  # before a command has started
        sys.stderr.write("council: interrupted\n")
        sys.exit(130)  # as in `orchestrator.cli.core.error_boundary`, which may not be imported yet
    except BaseException as error:
        if "Too many open files" not in str(error):
            raise
        # As in `orchestrator.errors`, which may not be importable. Python could not print the traceback either.
        sys.stderr.write("council: too many open files: raise the limit of open files (`ulimit -n`)\n")
        sys.exit(1)


def _run() -> None:
    from orchestrator.client.quick_parser import is_session_command  # noqa: PLC0415  an interrupt may arrive during the import

    if is_session_command(sys.argv[1:]):
        from orchestrator.client.main import run  # noqa: PLC0415  only for session commands

        code = run(sys.argv[1:])
        if code is not None:
            sys.exit(code)
    if sys.flags.no_site:  # as the command in a session is started, which is quicker
        import site  # noqa: PLC0415

        site.main()
    # Pydantic would read the metadata of all installed packages in search of plugins of its own, which takes 20 ms.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    from orchestrator.cli.main import main as whole  # noqa: PLC0415  the long way

    whole(prog_name="council")


if __name__ == "__main__":
    main()
