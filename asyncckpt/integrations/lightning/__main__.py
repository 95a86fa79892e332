"""``python -m asyncckpt.integrations.lightning CHECKPOINT OUT`` makes a file for plain Lightning."""

from __future__ import annotations

import argparse

from asyncckpt.integrations.lightning import export


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m asyncckpt.integrations.lightning", description=__doc__)
    parser.add_argument("checkpoint", help="a .ckpt of AsyncckptIO, or a run's directory")
    parser.add_argument("out", help="the file to write, such as exported.ckpt")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it exists")
    given = parser.parse_args()
    export(given.checkpoint, given.out, overwrite=given.overwrite)


if __name__ == "__main__":
    main()
