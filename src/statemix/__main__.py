"""`python -m statemix` is the command `statemix`."""

import sys

from statemix.cli import main

if __name__ == "__main__":  # processes of a sweep import this file too
    sys.exit(main())
