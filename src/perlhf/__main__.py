"""`python -m perlhf`."""

import sys

from perlhf.cli import main

if __name__ == "__main__":
    sys.exit(main())
