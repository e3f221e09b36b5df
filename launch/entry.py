"""The console script `reelscale`; also `python -P -m launch.entry`."""

from __future__ import annotations

import atexit
import os
import sys

from launch.own_packages import check_own_packages


def main() -> None:
    """Runs the command line and exits: 0 done, 2 the user's input, 1 the machine, 75 stopped on request."""
    try:
        check_own_packages()
    except ImportError as error:
        sys.stderr.write(f"reelscale: error: {error}\n")
        sys.exit(2)
    # A rank that goes away makes PyTorch's store print a C++ stack trace on every other rank; ours say it in one line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from launch.cli import run_command  # only now: it imports the other packages

    code = run_command(sys.argv[1:])
    # Everything is on disk and every exit function runs; what is left out is Python taking PyTorch apart, a second in
    # which the ranks of a job would only keep each other waiting.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
