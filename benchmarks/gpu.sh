#!/bin/sh
# What a machine with a GPU is asked, in parts of at most ten minutes each:
#
#   sh benchmarks/gpu.sh tests OUT    the tests that need a GPU
#   sh benchmarks/gpu.sh bench OUT    what decides: saves by way of the device and of the host, and the nearest peers
#   sh benchmarks/gpu.sh rest OUT     codecs, zarr and the other peers
#
# OUT gets the tests' log, and gpu.json and gpu.md of the suite. Nothing is downloaded.
set -u
part=${1:-}
out=${2:-gpu-out}
export PYTHONPATH="$PWD"
case $part in
tests)
    mkdir -p "$out"
    python -m pytest -m cuda -rs --timeout 200 tests/stage tests/loop tests/ranks/test_replicas.py 2>&1 | tee "$out/tests.log"
    ;;
bench)
    mkdir -p "$out"
    python -m benchmarks gpu --rounds 1 --out "$out/bench" --directory "$out" \
        --peers "device; device, threads; deferred; eager; DCP async_save, thread; torch_checkpointing"
    ;;
rest)
    mkdir -p "$out"
    python -m benchmarks gpu --rounds 1 --out "$out/rest" --directory "$out" \
        --peers "device, watched; device, planes; device, zarr; deferred, planes; deferred, zarr; DCP async_save, process"
    ;;
*)
    echo "usage: sh benchmarks/gpu.sh tests|bench|rest OUT" >&2
    exit 2
    ;;
esac
