"""The console script `reelscale`; also `python -P -m launch.entry`."""

from __future__ import annotations

import sys

from launch.own_packages import check_own_packages


def main() -> None:
    """Runs the command line and exits: 0 done, 2 the user's input, 1 the machine, 75 stopped on request."""
    try:
        check_own_packages()
    except ImportError as error:
        sys.stderr.write(f"reelscale: error: {error}\n")
        sys.exit(2)
    from launch.cli import run_command  # only now: it imports the other packages

    sys.exit(run_command(sys.argv[1:]))


if __name__ == "__main__":
    main()
