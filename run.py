"""Run an experiment or a task: `python run.py --help`."""

import sys
from pathlib import Path

try:
    from vlmscope.app import main
except ModuleNotFoundError as error:
    if error.name != "vlmscope":
        raise
    # Not installed: the clone itself serves, as long as the dependencies are there.
    sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))
    from vlmscope.app import main

if __name__ == "__main__":
    sys.exit(main())
