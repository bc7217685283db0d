"""Run the command line by `python -m ospo_fast`."""

import sys

from ospo_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
