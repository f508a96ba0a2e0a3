"""`python -m dymoe`: the command line without the installed script."""

import sys

from dymoe.cli import main

if __name__ == "__main__":
    sys.exit(main())
