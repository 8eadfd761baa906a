"""Run the command line: `phinetune …` or `python -m phinetune …`."""

from __future__ import annotations

import sys


def main() -> None:
    from phinetune.cli.main import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
