"""The command line: ``python -m rl train | eval | plot | record | check``."""

import sys

from .run.cli import main

if __name__ == "__main__":
    sys.exit(main())
