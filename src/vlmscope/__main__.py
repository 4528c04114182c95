"""The command line as `python -m vlmscope`."""

import sys

from vlmscope.app import main

if __name__ == "__main__":
    sys.exit(main())
