# make repro   set up, run the whole pipeline on the embedded default
# make test    set up, run the tests
# make emulate set up Triton, run the tests of the GPU kernels by its emulation on a CPU
# make lint    set up, ruff and mypy
# make bench   set up the peers too, measure the training step beside theirs (20 minutes, needs the default's model)
# make clean   remove the environments (data, models and DVC's cache stay)

PYTHON ?= python3
VENV := .venv
# DVC runs `python` from the PATH: everything runs with the environment's folder in front.
ENV := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" VIRTUAL_ENV="$(CURDIR)/$(VENV)"
# The peers have an environment of their own, beside all that the project has.
BENCH := .venv-bench
# So has Triton, which torch brings along for GPUs: on a CPU each process would carry 80 MB of it.
EMULATION := .venv-emulation
TRITON := triton==3.7.1

.PHONY: repro test emulate lint bench format clean
.DEFAULT_GOAL := repro

$(VENV)/.ready: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1); expected Python 3.11 to 3.13; run make PYTHON=python3.11" >&2; exit 1; }
	@echo "setting up $(VENV) from requirements.lock (some minutes, once)"
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	@touch $@

repro: $(VENV)/.ready
	@$(ENV) dvc repro

# A file a process; the two that take longest go first, so that none of them is left for the end.
LONGEST := tests/test_pipeline.py tests/train/test_resuming.py

test: $(VENV)/.ready
	@$(ENV) python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
	  $(LONGEST) tests

$(EMULATION)/.ready: $(VENV)/.ready
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	  --target $(EMULATION) $(TRITON)
	@touch $@

emulate: $(EMULATION)/.ready
	@$(ENV) PYTHONPATH=$(EMULATION) TRITON_INTERPRET=1 python -m pytest tests/train/test_kernels.py

lint: $(VENV)/.ready
	@$(ENV) ruff format --check .
	@$(ENV) ruff check .
	@$(ENV) mypy

$(BENCH)/.ready: requirements.lock benchmarks/requirements.lock
	@echo "setting up $(BENCH) with the peers (some minutes, once)"
	@$(BENCH)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(BENCH)
	@$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --requirement requirements.lock --requirement benchmarks/requirements.lock
	@touch $@

bench: $(BENCH)/.ready
	@$(BENCH)/bin/python -m benchmarks.training --minutes 20

format: $(VENV)/.ready
	@$(ENV) ruff format .
	@$(ENV) ruff check --fix .

clean:
	rm -rf $(VENV) $(BENCH) $(EMULATION)
