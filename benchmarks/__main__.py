"""``python -m benchmarks`` runs the command line of the benchmarks."""

from benchmarks.cli import main

if __name__ == "__main__":
    main()
