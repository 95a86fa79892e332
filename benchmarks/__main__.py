"""``python -m benchmarks`` runs the command line of the benchmarks."""

from benchmarks.cli import app

if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
