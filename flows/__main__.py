"""Entry point of the `sparsemill` command; `python -m flows` is the same.

Kept apart from the commands so that a Ctrl-C while they are still being imported is met, too.
"""

from __future__ import annotations

import sys

STOPPED = "stopped: what is finished is kept; the same command goes on from there"


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        from flows.cli import command_line

        code = command_line()
    except KeyboardInterrupt:
        sys.stderr.write(f"{STOPPED}\n")
        code = 2
    sys.stdout.flush()
    sys.exit(code)


if __name__ == "__main__":
    main()
