"""The command line: `tinytrain`, or `python -m tinytrain_ext`."""

import sys


def main() -> int:
    """Runs `cli.main`; an interruption while it is still being loaded is no traceback either."""
    try:
        from .cli import main as run

        return run()
    except KeyboardInterrupt:
        sys.stderr.write("tinytrain: interrupted\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
