"""``python -m dist_layerlr.cli``."""

import sys

from dist_layerlr.cli.program import main

if __name__ == "__main__":
    sys.exit(main())
