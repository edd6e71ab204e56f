"""`python -m longattn` and the command `longattn`."""

import os
import signal
import sys


def main() -> int:
    """Runs the command line. Until it is loaded, which takes a second, Ctrl-C ends the process at once."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # a shell's background process ignores Ctrl-C
        signal.signal(signal.SIGINT, _end)
    from longattn import launch, terminal

    terminal.open_closed_streams()
    terminal.outlive_stderr()
    try:
        from longattn import cli
    except ValueError as error:  # JAX reads its environment variables while it is imported
        terminal.say(f"longattn: {error}: correct that environment variable, or unset it")
        return 2
    signal.signal(signal.SIGINT, before)
    try:
        return cli.main()
    except KeyboardInterrupt:  # before the command began
        return launch.interrupted(_command())


def _command() -> str:
    return sys.argv[1] if len(sys.argv) > 1 else "longattn"


def _end(*_: object) -> None:
    # No exception: an import turns it into other errors, or goes on without what it interrupted.
    os.write(2, f"longattn: {_command()} was interrupted before it began\n".encode(errors="replace"))
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
