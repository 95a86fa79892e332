# Two commands do everything on a fresh machine: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow test-frameworks test-frameworks-newest test-deepspeed test-torchtitan test-ray test-tensorflow faults nfs coverage lint docs bench \
	bench-micro clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lint]'
	touch $(STAMP)

demo: $(STAMP)            ## train, kill, resume, compare, draw: the main job on real text
	$(BIN)/asyncckpt demo --out demo-run

# Processes of `make test`: two more than the cores, because many tests wait for disks and children; each computes on one
# thread, since threads of several that wait for each other by turning round take the cores from those that work
WORKERS ?= 4

test: $(STAMP)            ## the fast suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-slow: $(STAMP)       ## the long tests
	$(BIN)/python -m pytest -m 'slow and not nfs'
	ASYNCCKPT_EXAMPLES=all $(BIN)/python -m pytest -m 'hypothesis and not slow'

test-frameworks: $(STAMP) ## the adapters to other libraries' trainers
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[frameworks]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'frameworks and not slow' tests/frameworks
	$(MAKE) test-deepspeed

# In environments of their own: accelerate, lightning and transformers behave otherwise where they find DeepSpeed, and
# torchtitan brings triton, and wants older data sets than trl's tests have.
$(VENV)-%/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-$*
	grep -v '^datasets==' constraints.txt > $(VENV)-$*/constraints.txt
	$(VENV)-$*/bin/python -m pip install --quiet --constraint $(VENV)-$*/constraints.txt torch
	$(VENV)-$*/bin/python -m pip install --quiet --constraint $(VENV)-$*/constraints.txt --editable '.[frameworks-$*]'
	touch $@

test-deepspeed: $(VENV)-deepspeed/.installed    ## the adapter to DeepSpeed
	OMP_NUM_THREADS=1 $(VENV)-deepspeed/bin/python -m pytest -m frameworks tests/frameworks/test_deepspeed.py

test-torchtitan: $(VENV)-torchtitan/.installed  ## the adapter to torchtitan (slow)
	OMP_NUM_THREADS=1 $(VENV)-torchtitan/bin/python -m pytest -m 'frameworks and slow' tests/frameworks/test_torchtitan.py

test-tensorflow: $(VENV)-tensorflow/.installed  ## conversions from and to TensorFlow (1.5 GB to install)
	$(VENV)-tensorflow/bin/python -m pytest -m 'slow or not slow' tests/convert/test_tensorflow.py

test-ray: $(VENV)-ray/.installed                ## the recipe for Ray Train (slow)
	OMP_NUM_THREADS=1 $(VENV)-ray/bin/python -m pytest -m 'frameworks and slow' tests/frameworks/test_launchers.py

# The newest versions of those libraries, in an environment of its own; torch stays the one of constraints.txt
NEWEST ?= .venv-newest
test-frameworks-newest:   ## the same with the newest release of each library, and what they are; constraints.txt holds the pins
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade pip
	grep '^torch==' constraints.txt > $(NEWEST)/torch.txt
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --constraint $(NEWEST)/torch.txt \
		--editable '.[frameworks]'
	$(NEWEST)/bin/python -m pip list | grep -iE '^(accelerate|lightning|peft|torch|transformers|trl) '
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -m 'frameworks and not slow' tests/frameworks

# Counts of `make faults`; each can be given: `make faults SIGKILLS=500`
SIGKILLS ?= 5000
RANK_FAULTS ?= 1000
FUZZ_RUNS ?= 10000000
EXT4 ?= 5000
XFS ?= 1000
BTRFS ?= 2000

faults: $(STAMP)          ## crashes, power losses, kills, full disks, damage, fuzzing, planted bugs: hours (docs/reliability.md)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[faults]'
	ASYNCCKPT_SIGKILLS=$(SIGKILLS) ASYNCCKPT_RANK_FAULTS=$(RANK_FAULTS) ASYNCCKPT_FAULT_PAIRS=-1 \
	FUZZ_RUNS=$(FUZZ_RUNS) FUZZ_SECONDS=86400 ASYNCCKPT_CONCURRENCY_SECONDS=60 \
	ASYNCCKPT_BLOCK_POINTS_EXT4=$(EXT4) ASYNCCKPT_BLOCK_POINTS_XFS=$(XFS) ASYNCCKPT_BLOCK_POINTS_BTRFS=$(BTRFS) \
	$(BIN)/python -m pytest -m "slow or not slow" -s --timeout 86400 \
		tests/faults tests/ranks/test_failures.py tests/ranks/test_mutants.py tests/ranks/test_random_faults.py

# Counts of `make nfs`, for each of v3 and v4.2
NFS_SIGKILLS ?= 100
NFS_SERVER_CRASHES ?= 28
NFS_CRASHES ?= 7

nfs: $(STAMP)             ## saves on NFS v3 and v4.2, server and client in User-Mode Linux: kills, servers that lose their power
	$(BIN)/python tests/nfs/machines.py
	ASYNCCKPT_NFS_SIGKILLS=$(NFS_SIGKILLS) ASYNCCKPT_NFS_SERVER_CRASHES=$(NFS_SERVER_CRASHES) \
	ASYNCCKPT_NFS_CRASHES=$(NFS_CRASHES) $(BIN)/python -m pytest -m nfs -s tests/nfs

coverage: $(STAMP)        ## branch coverage of what commits, finds, deletes and stores checkpoints (pyproject.toml), by the fast suite
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[faults]'
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest --timeout 1200
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

lint: $(STAMP)            ## style, types and the layer rule
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP)            ## the documentation site, in site/; a broken link or reference fails it (look: python -m http.server -d site)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(STAMP)           ## the tables of docs/performance.md, on this machine (about 20 minutes, 6 GB of disk)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[peers]'
	$(BIN)/python -m benchmarks

bench-micro: $(STAMP)     ## the small parts (hashes, copies, layout, manifest), and the figures of docs/design (minutes, 3 GB of disk)
	$(BIN)/python -m pytest -m bench benchmarks/micro

clean:
	rm -rf $(VENV) demo-run bench-out site .mypy_cache .ruff_cache .pytest_cache
