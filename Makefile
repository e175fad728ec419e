# Everything runs in .venv, which the first target that needs it makes. `make setup` after a change to csrc rebuilds.
PYTHON ?= python3
TORCH_VERSION ?= 2.13.0

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-torch-$(TORCH_VERSION)
SOURCES := pyproject.toml setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: setup demo train-demo test test-full bench bench-smoke bench-report bench-readme gpu-check gpu-tune lint clean

setup: $(READY)

$(READY): $(SOURCES)
	rm -f $(VENV)/.ready-*
	$(PYTHON) -m venv $(VENV)
	echo "torch==$(TORCH_VERSION)" > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[demo,dev,bench]'
	touch $(READY)

demo: setup
	$(BIN)/calguide-fast demo --out out/demo

# into out/train-demo; OUT=calguide_fast/demo/assets replaces the package's own networks
train-demo: setup
	$(BIN)/calguide-fast train-demo $(if $(OUT),--out $(OUT))

# a test takes one thread, so the processors share them out
SHARED_OUT := -n auto --maxprocesses 8 --dist worksteal

test: setup
	$(BIN)/python -m pytest tests $(SHARED_OUT)

test-full: setup
	$(BIN)/python -m pytest tests $(SHARED_OUT) --full

bench: setup
	$(BIN)/python -m pytest benchmarks --benchmark-only

bench-smoke: setup
	$(BIN)/python -m pytest benchmarks --benchmark-only --smoke

# runs and writes benchmarks/results/<name>.json, .md and charts; NAME=… names them, BENCH="--threads 2" is pytest's
bench-report: setup
	mkdir -p out
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=out/benchmarks.json $(BENCH)
	$(BIN)/python benchmarks/report.py out/benchmarks.json $(if $(NAME),--name $(NAME))

# the README's tables anew, from a run on this machine that is kept in the place of the last one
README_RUN ?= epyc-1-thread
bench-readme:
	$(MAKE) bench-report NAME=$(README_RUN)
	$(BIN)/python benchmarks/summary.py benchmarks/results/$(README_RUN).json

# with the PyTorch of $(PYTHON), which is the GPU's; CALL=right, fast or whole picks the parts of ten minutes,
# PARTS=build,tests any, LIMIT=60 gives each so many seconds; `$(PYTHON) tools/gpu_check.py --plan` lists them
gpu-check:
	$(PYTHON) tools/gpu_check.py $(if $(CALL),--call $(CALL)) $(if $(PARTS),--parts $(PARTS)) \
	    $(if $(OUT),--out $(OUT)) $(if $(LOGS),--logs $(LOGS)) $(if $(LIMIT),--limit $(LIMIT))

# which constants of the kernels this GPU would have otherwise: out/gpu-tune.md
gpu-tune:
	$(PYTHON) tools/gpu_tune.py $(if $(OUT),--out $(OUT))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.h' '*.cpp' '*.cu' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build out *.egg-info calguide_fast/*.so
