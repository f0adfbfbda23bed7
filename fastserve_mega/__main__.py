"""`python -m fastserve_mega` is the `fastserve-mega` command."""

import sys

from fastserve_mega.cli import main

if __name__ == "__main__":
    sys.exit(main())
