"""`python -m longattn` and the command `longattn`."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from longattn import launch, terminal


def main() -> int:
    """Runs the command line. Until it is loaded, which takes a second, Ctrl-C ends the process at once."""
    terminal.open_closed_streams()
    terminal.outlive_stderr()
    before = signal.signal(signal.SIGINT, _end)
    try:
        from longattn import cli
    except ValueError as error:  # JAX reads its environment variables while it is imported
        terminal.say(f"longattn: {error}: correct that environment variable, or unset it")
        return 2
    signal.signal(signal.SIGINT, before)
    return cli.main()


def _end(*_: Any) -> None:
    # No exception: an import turns it into other errors, or goes on without what it interrupted.
    launch.interrupted(sys.argv[1] if len(sys.argv) > 1 else "longattn")
    os._exit(launch.INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
