"""Runs one parser's fuzzer until a count or a time is reached: ``python fuzz_engine.py PARSER --runs N --seconds S``.

With atheris (libFuzzer: guided by coverage of the parser's own bytecode) where it is installed, for the first
executions; the rest, several times as fast, mutates what those found. Plain seeded mutation alone otherwise. Prints one
JSON line: executions, seconds, executions a second, peak memory over the start. Exits with another code than 0 where
anything but a typed error came out, an input took over 10 s, or memory passed the limit.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: What one child runs: atheris keeps some hundred bytes for every execution (a plain loop over the same parsers keeps
#: none), which would end a long run at libFuzzer's memory limit.
RUNS_A_CHILD = 1_000_000
#: After so many executions guidance finds next to nothing new, and costs most of the time.
GUIDED_RUNS = 1_000_000
#: Beyond what a parser's input and output may take by themselves (``max_bytes`` and what is declared: 256 KiB here).
MEMORY_ALLOWANCE_MIB = 64
INSTRUMENTED = tuple(
    f"asyncckpt.{name}"
    for name in (*("manifest", "jsontree", "formats", "codecs", "read", "restore", "storage.lease"),)
)


def resident_mib(key: str = "VmRSS") -> float:
    """This process's memory, or (``VmHWM``) the most it ever was."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    return 0.0


def plain_run(parser: Any, seconds: float, runs: int, seed: int, more: Sequence[bytes] = ()) -> dict[str, Any]:
    """Seeded mutation without guidance, of the parser's seeds and ``more``: what still finds a new outcome is kept."""
    rng = random.Random(seed)
    corpus = [*parser.seeds(), *more]
    outcomes = {parser.execute(data) for data in corpus}
    start, before = time.perf_counter(), resident_mib()
    done = 0
    while done < runs and time.perf_counter() - start < seconds:
        # rather the shorter of two: it says as much, and is done sooner
        data = parser.mutated(min(rng.choice(corpus), rng.choice(corpus), key=len), rng)
        began = time.perf_counter()
        try:
            outcome = parser.execute(data)
        except BaseException:
            Path(f"finding-{parser.name}").write_bytes(data)
            raise
        if time.perf_counter() - began > 10:
            raise TimeoutError(f"an input of {len(data)} bytes took over 10 s")
        if outcome not in outcomes and len(corpus) < 5000:
            outcomes.add(outcome)
            corpus.append(data)
        done += 1
    return {"executions": done, "seconds": time.perf_counter() - start, "grown_mib": resident_mib("VmHWM") - before}


def guided_child(parser: Any, seconds: float, runs: int, seed: int, folder: str) -> None:
    """libFuzzer, which ends the process itself. Its own tables grow; what counts is by how much one execution raises
    the process's peak."""
    import atheris

    corpus = Path(folder, "corpus")
    corpus.mkdir(exist_ok=True)  # with what the children before found
    for number, data in enumerate(parser.seeds()):
        (corpus / f"seed-{number}").write_bytes(data)
        parser.execute(data)
    rises = Path(folder, "rise")
    worst = float(rises.read_text()) if rises.exists() else 0.0

    def one(data: bytes) -> None:
        nonlocal worst
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        parser.execute(data)
        rise = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        if rise > worst:
            worst = rise
            rises.write_text(str(rise))
            if rise > MEMORY_ALLOWANCE_MIB:
                raise MemoryError(f"an input of {len(data)} bytes took {rise:.0f} MiB")

    def mutate(data: bytes, max_size: int, number: int) -> bytes:
        if number % 2 == 0 or not data:
            return bytes(atheris.Mutate(data, max_size))
        return bytes(parser.mutated(bytes(data), random.Random(number), max_size))

    flags = [f"-runs={runs}", f"-max_total_time={int(seconds)}", f"-seed={seed + 1}", "-timeout=10", "-verbosity=0"]
    flags += [f"-max_len={parser.max_bytes}", "-rss_limit_mb=4096", "-len_control=0", "-print_final_stats=1"]
    artifacts = os.environ.get("FUZZ_ARTIFACTS", tempfile.gettempdir())
    atheris.Setup(
        [sys.argv[0], *flags, f"-artifact_prefix={artifacts}/{parser.name}-", str(corpus)], one, custom_mutator=mutate
    )
    atheris.Fuzz()


def guided_run(chosen: argparse.Namespace) -> None:
    """Start one child after the other; say in one line what they did. Raises ``SystemExit`` with the words of one that
    found something."""
    executions, start = 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        while True:
            seconds = chosen.seconds - (time.perf_counter() - start)
            if executions >= min(chosen.runs, GUIDED_RUNS) or (executions and seconds < 1):
                break
            runs = min(RUNS_A_CHILD, min(chosen.runs, GUIDED_RUNS) - executions)
            executions += _child(chosen.parser, folder, chosen.seed + executions, seconds, runs)
        rise = Path(folder, "rise")
        grown = round(float(rise.read_text()), 1) if rise.exists() else 0.0
        guided = executions
        if executions < chosen.runs and seconds >= 1:
            found = _unguided(chosen, folder, seconds, chosen.runs - executions)
            executions += found["executions"]
            grown = max(grown, found["grown_mib"])
    spent = time.perf_counter() - start
    line = {"parser": chosen.parser, "engine": "atheris", "executions": executions, "guided": guided}
    line |= {"seconds": round(spent, 1), "grown_mib": grown, "per_second": round(executions / spent)}
    print(json.dumps(line), flush=True)


def _unguided(chosen: argparse.Namespace, folder: str, seconds: float, runs: int) -> Any:
    """The rest, in a process whose parser is not instrumented."""
    command = [sys.executable, __file__, chosen.parser, "--unguided", f"--corpus={folder}/corpus"]
    command += [f"--seed={chosen.seed}", f"--seconds={seconds}", f"--runs={runs}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise SystemExit(f"{chosen.parser}: code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _child(parser: str, folder: str, seed: int, seconds: float, runs: int) -> int:
    """How many it executed."""
    command = [sys.executable, __file__, parser, f"--child={folder}", f"--seed={seed}"]
    command += [f"--seconds={max(1, seconds)}", f"--runs={runs}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise SystemExit(f"{parser}: code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return int(done.stderr.rpartition("stat::number_of_executed_units:")[2].split()[0])


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("parser")
    options.add_argument("--seconds", type=float, default=30)
    options.add_argument("--runs", type=int, default=10**9)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--unguided", action="store_true")
    options.add_argument("--corpus", help="with --unguided: a folder of further seeds")
    options.add_argument("--child", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    sys.path[:0] = [os.path.dirname(__file__), str(Path(__file__).parents[2])]  # its own modules, and tests/support
    guided = not chosen.unguided and importlib.util.find_spec("atheris") is not None
    if guided and not chosen.child:
        guided_run(chosen)
        return
    if guided:
        import atheris

        with atheris.instrument_imports(include=[*INSTRUMENTED]):
            import fuzz_parsers
    import fuzz_parsers

    warnings.simplefilter("ignore")
    logging.disable()
    parser = fuzz_parsers.PARSERS[chosen.parser]
    if guided:
        guided_child(parser, chosen.seconds, chosen.runs, chosen.seed, chosen.child)
        return
    more = [path.read_bytes() for path in sorted(Path(chosen.corpus).iterdir())] if chosen.corpus else []
    found = plain_run(parser, chosen.seconds, chosen.runs, chosen.seed, more)
    found["per_second"] = round(found["executions"] / found["seconds"])
    print(json.dumps({"parser": parser.name, "engine": "mutation", **found}), flush=True)
    if found["grown_mib"] > MEMORY_ALLOWANCE_MIB:
        raise SystemExit(f"memory grew by {found['grown_mib']} MiB")


if __name__ == "__main__":
    main()
