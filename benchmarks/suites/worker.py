"""``python -m benchmarks.suites.worker saves asyncckpt DIRECTORY`` runs one scenario of one peer in a fresh process.

It prints one JSON object a line on stdout, and nothing else: what libraries print goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile

from benchmarks.harness.state import SIZES
from benchmarks.suites.engine import SCENARIOS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suites.worker", description=__doc__)
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("peer")
    parser.add_argument("directory", help="on the file system to measure; what is written there is removed again")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    directory = tempfile.mkdtemp(prefix="asyncckpt-bench-", dir=options.directory)
    try:
        for event in SCENARIOS[options.scenario](options.peer, options.size, directory, options.repeats):
            lines.write(json.dumps(event) + "\n")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        lines.close()


if __name__ == "__main__":  # peers that spawn processes import this module again
    main()
