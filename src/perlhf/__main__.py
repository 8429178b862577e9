"""`python -m perlhf`."""

import sys

from perlhf.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
