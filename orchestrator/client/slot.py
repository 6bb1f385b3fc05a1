"""`council slot`: run a heavy command once the session holds a slot, so that it does not compete with other checks."""

from __future__ import annotations

import os
import sys

from orchestrator.client.commands import HOLD_SLOT
from orchestrator.client.session import SessionRequestError, find_session

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

#: Set for commands that run in a slot; a nested `council slot` would otherwise wait for its own parent.
SLOT_VARIABLE = "COUNCIL_SLOT"
EXIT_BAD_INPUT, EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND = 2, 126, 127


def run(argv: Sequence[str]) -> int:
    """Replace this process with a command once the session holds a slot; return an exit code if that fails.

    The command and its children inherit the connection to the orchestrator, which releases the slot when it closes.
    """
    if SLOT_VARIABLE not in os.environ:
        try:
            connected, _ = find_session(os.environ, os.getcwd()).hold(HOLD_SLOT.name, {}, None)  # noqa: PTH109  as in `main`
        except (SessionRequestError, FileNotFoundError) as error:
            sys.stderr.write(f"council: {error}\n")
            return EXIT_BAD_INPUT
        os.set_inheritable(connected.detach(), True)
    try:
        os.execvpe(argv[0], [*argv], {**os.environ, SLOT_VARIABLE: "1"})  # noqa: S606  the caller's own command
    except OSError as error:
        sys.stderr.write(f"council: can't run {argv[0]}: {error.strerror}\n")
        return EXIT_NOT_FOUND if isinstance(error, FileNotFoundError) else EXIT_NOT_EXECUTABLE
