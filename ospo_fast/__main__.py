"""`python -m ospo_fast`: the command line."""

import sys

from ospo_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
