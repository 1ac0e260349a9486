# make quickstart   install into .venv, then train and compare four small models
# make test         install into .venv, then lint, type checks and tests
# make exact        learn the words of 32 elements of S5, and prove the answers right at every length (5 minutes)
# make experiments  train everything the claims need, hours: BUDGET=quick (2 cores) or full (a cluster); it resumes
# make results      draw the figures and tables of the claims again from results/
# make docs         build the documentation site into build/site
# make wheels       build dist/: the sdist, and a wheel that needs no compiler, and try it in an environment of its own
# make sanitize     build the kernels with the address and undefined-behaviour sanitizers, and run them all (minutes);
#                   and those for GPUs in their emulator, each access of a lane watched
# make aarch64      compile the kernels for aarch64, and run a part of that in an emulator (g++-aarch64-linux-gnu, qemu-user)
# make attack       damage files, call functions wrongly, kill processes, and see whether anything is wrong in silence
# make mutation     plant faults in a copy of the sources, one at a time, and see whether a test notices (minutes)
# make compat       run the tests with the oldest and the newest releases of what statemix needs (20 GB of build/)
# make format       let ruff and clang-format rewrite the sources

# TORCH pins the version developed with. Where a CPU build is wanted and the default is another, give pip the index of
# CPU builds as PyTorch's installation page says.
TORCH ?= torch==2.13.0
PYTHON ?= python3
SHELL := bash
BIN := .venv/bin
SOURCES := src tests experiments examples docs/hooks.py
KERNELS := $(wildcard csrc/*.h csrc/*.cpp csrc/gpu/*.cuh) tests/emulated.cpp
BUDGET ?= quick
SEED ?= 0
CLAIMS := state_tracking exact structure normalization memory language regular

.PHONY: quickstart test docs exact experiments results wheels sanitize aarch64 attack mutation compat format clean
quickstart: .venv/installed
	$(BIN)/python experiments/quickstart.py

test: .venv/installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/clang-format --dry-run -Werror $(KERNELS)
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

exact: .venv/installed
	$(BIN)/statemix train --preset exact --task permutation --out runs/s5-32
	$(BIN)/statemix verify runs/s5-32

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# a run that diverges is a result: status 1 goes on
experiments: .venv/installed
	for claim in $(CLAIMS); do $(BIN)/statemix sweep experiments/$$claim.py --budget $(BUDGET) --out runs/$$claim || test $$? = 1 || exit 1; done
	$(BIN)/python experiments/results.py --collect $(CLAIMS)
	$(BIN)/python experiments/endless.py runs/exact
	$(BIN)/python experiments/relu.py

results: .venv/installed
	$(BIN)/python experiments/results.py

# OpenMP is the one that torch brings and loads first: one pool of threads, and no second copy.
wheels: .venv/installed
	rm -rf dist build/wheels
	$(BIN)/python -m build --outdir build/wheels
	mkdir -p dist && mv build/wheels/*.tar.gz dist
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheels/*.whl
	$(BIN)/auditwheel show dist/*.whl
	ls -l dist
	$(BIN)/python tests/wheels.py --torch "$(TORCH)" dist/*.whl

# Python itself is not sanitised, so the runtime is loaded before it, and with it libstdc++, whose exceptions it watches.
sanitize: .venv/installed
	$(or $(wildcard $(BIN)/cmake),cmake) -S . -B build/sanitize -DSTATEMIX_SANITIZE=ON
	$(or $(wildcard $(BIN)/cmake),cmake) --build build/sanitize
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	$(BIN)/python tests/sanitize.py build/sanitize/statemix_cpu.so
	$(BIN)/python tests/sanitize_gpu.py

aarch64: .venv/installed
	mkdir -p build
	aarch64-linux-gnu-g++ -std=c++17 -O3 -static -ffp-contract=fast -fno-math-errno -Wno-psabi -fopenmp \
	-DSTATEMIX_KERNELS=kernels_baseline csrc/dispatch.cpp csrc/kernels.cpp tests/emulated.cpp -o build/emulated-aarch64
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python tests/emulated.py qemu-aarch64 build/emulated-aarch64

attack: .venv/installed
	$(BIN)/python tests/attack.py --seed $(SEED) --out build/attack.json

mutation: .venv/installed
	$(BIN)/python tests/mutation.py

compat: .venv/installed
	$(BIN)/python tests/compat.py --torch $(TORCH)

format: .venv/installed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/clang-format -i $(KERNELS)

clean:
	rm -rf .venv build

# The install is editable: Python sources take effect at once, the kernels when make sees that csrc/ has changed.
# Of what pip says of it, what is compiled, and what went wrong.
SAID := \*\*\* |\[[0-9]+/[0-9]+\]|[Ee]rror|[Ww]arning:|Success
.venv/installed: pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q $(TORCH)
	set -o pipefail; $(BIN)/pip install -v -e ".[dev]" 2>&1 | grep --line-buffered -E "$(SAID)"
	touch $@
