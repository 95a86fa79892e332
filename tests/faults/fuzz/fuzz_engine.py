"""Runs one parser's fuzzer until a count or a time is reached: ``python fuzz_engine.py PARSER --runs N --seconds S``.

With atheris (libFuzzer: guided by coverage of the parser's own bytecode) where it is installed, and with plain seeded
mutation otherwise. Prints one JSON line: executions, seconds, executions a second, peak memory over the start. Exits
with another code than 0 where anything but a typed error came out, an input took over 10 s, or memory passed the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

#: Beyond what a parser's input and output may take by themselves (``max_bytes`` and what is declared: 256 KiB here).
MEMORY_ALLOWANCE_MIB = 64
INSTRUMENTED = (
    *("asyncckpt.manifest", "asyncckpt.plain", "asyncckpt.formats", "asyncckpt.views", "asyncckpt.codecs"),
    *("asyncckpt.reading", "asyncckpt.restore", "asyncckpt.targets", "asyncckpt.filling", "asyncckpt.records"),
    *("asyncckpt.storage.lease", "asyncckpt.layers"),
)


def resident_mib(key: str = "VmRSS") -> float:
    """This process's memory, or (``VmHWM``) the most it ever was."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    return 0.0


def plain_run(parser: Any, seconds: float, runs: int, seed: int) -> dict[str, Any]:
    """Seeded mutation without guidance: what still finds a new outcome is kept as a seed."""
    rng = random.Random(seed)
    corpus = list(parser.seeds())
    outcomes = {parser.execute(data) for data in corpus}
    start, before = time.perf_counter(), resident_mib()
    done = 0
    while done < runs and time.perf_counter() - start < seconds:
        data = parser.mutated(rng.choice(corpus), rng)
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


def guided_run(parser: Any, seconds: float, runs: int, seed: int, corpus: str) -> None:
    """libFuzzer ends the process itself; the line is printed before."""
    import atheris

    for number, data in enumerate(parser.seeds()):
        Path(corpus, f"seed-{number}").write_bytes(data)
        parser.execute(data)
    for extra in range(200):  # whatever is allocated once is there before memory is measured
        parser.execute(parser.mutated(parser.seeds()[0], random.Random(extra)))
    before, start, done = resident_mib(), time.perf_counter(), 0

    def one(data: bytes) -> None:
        nonlocal done
        done += 1
        parser.execute(data)

    def mutate(data: bytes, max_size: int, number: int) -> bytes:
        if number % 4 == 0 or not data:
            return bytes(atheris.Mutate(data, max_size))
        return parser.mutated(bytes(data), random.Random(number), max_size)

    def report() -> None:
        spent = time.perf_counter() - start
        line = {"parser": parser.name, "engine": "atheris", "executions": done, "seconds": round(spent, 1)}
        line |= {"per_second": round(done / spent), "grown_mib": round(resident_mib("VmHWM") - before, 1)}
        print(json.dumps(line), flush=True)

    import atexit

    atexit.register(report)
    flags = [f"-runs={runs}", f"-max_total_time={int(seconds)}", f"-seed={seed + 1}", "-timeout=10", "-verbosity=0"]
    flags += [f"-max_len={parser.max_bytes}", f"-rss_limit_mb={int(before) + MEMORY_ALLOWANCE_MIB}", "-len_control=0"]
    artifacts = os.environ.get("FUZZ_ARTIFACTS", tempfile.gettempdir())
    atheris.Setup(
        [sys.argv[0], *flags, f"-artifact_prefix={artifacts}/{parser.name}-", corpus], one, custom_mutator=mutate
    )
    atheris.Fuzz()


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("parser")
    options.add_argument("--seconds", type=float, default=30)
    options.add_argument("--runs", type=int, default=10**9)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--unguided", action="store_true")
    chosen = options.parse_args()
    sys.path.insert(0, os.path.dirname(__file__))
    guided = not chosen.unguided
    if guided:
        try:
            import atheris
        except ImportError:
            guided = False
        else:
            with atheris.instrument_imports(include=[*INSTRUMENTED]):
                import fuzz_parsers
    import fuzz_parsers

    parser = fuzz_parsers.PARSERS[chosen.parser]
    if not guided:
        found = plain_run(parser, chosen.seconds, chosen.runs, chosen.seed)
        found["per_second"] = round(found["executions"] / found["seconds"])
        print(json.dumps({"parser": parser.name, "engine": "mutation", **found}), flush=True)
        if found["grown_mib"] > MEMORY_ALLOWANCE_MIB:
            raise SystemExit(f"memory grew by {found['grown_mib']} MiB")
        return
    with tempfile.TemporaryDirectory() as corpus:
        guided_run(parser, chosen.seconds, chosen.runs, chosen.seed, corpus)


if __name__ == "__main__":
    main()
