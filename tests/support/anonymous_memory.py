"""Runs a conversion in a process of its own, and tells how much anonymous memory it took above its libraries."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

_SCRIPT = """
import sys, threading, time, os
verb, fmt, source, target = sys.argv[1:5]
import torch
from asyncckpt import Run
from asyncckpt.convert.exporting import ExportOptions
from asyncckpt.convert.formats import export_checkpoint, import_checkpoint
if fmt == "gguf" or fmt == "Q8_0":
    import gguf
if fmt == "onnx":
    import onnx, onnx.helper, onnx.external_data_helper
if fmt == "dcp":
    import torch.distributed.checkpoint
if fmt == "torch":
    import torch._subclasses.fake_tensor
if fmt == "hf":
    import transformers
    transformers.LlamaForCausalLM

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

before, peak, going = anonymous(), [0], [True]
def watch():
    while going[0]:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch, daemon=True); thread.start()
began = time.perf_counter()
if verb == "import":
    import_checkpoint(source, target, 1)
else:
    with Run(source).open() as checkpoint:
        options = ExportOptions(quantized="Q8_0" if fmt == "Q8_0" else None)
        export_checkpoint(checkpoint, target, format="gguf" if fmt == "Q8_0" else fmt, options=options)
seconds = time.perf_counter() - began
going[0] = False; thread.join()
print(f"anonymous {peak[0] - before} seconds {seconds:.2f}")
"""


def converted(verb: str, fmt: str, source: Path, target: Path) -> tuple[int, float]:
    """Import or export; return how many bytes of anonymous memory it took above its libraries, and its seconds."""
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, verb, fmt, str(source), str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"anonymous (-?\d+) seconds ([\d.]+)", done.stdout)
    assert found is not None, done.stdout
    return int(found[1]), float(found[2])
