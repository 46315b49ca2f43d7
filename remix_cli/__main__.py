"""`python -m remix_cli` is `remix`."""

import sys

from remix_cli import main

if __name__ == "__main__":
    sys.exit(main())
