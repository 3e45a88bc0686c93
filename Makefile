# `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
# DVC runs `python` from the PATH: everything runs with the environment's folder in front.
ENV := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" VIRTUAL_ENV="$(CURDIR)/$(VENV)"
EXTRAS := .venv-extras
# Triton comes with torch for GPUs. On a CPU it would cost each process 80 MB.
EMULATION := .venv-emulation
AUDIT := .venv-audit
TRITON := triton==3.7.1
PIP := -m pip install --quiet --disable-pip-version-check --no-warn-script-location

.PHONY: help repro chat test faults emulate lint bench extras plots format clean sbom audit
.DEFAULT_GOAL := help

help:  ## list the targets
	@echo "Needs Linux x86-64, git, Python 3.11 to 3.13 and 3 GB of disk. Every target sets up what it needs, once."
	@sed -n 's/^\([a-z]*\):[^#]*##/  make \1@/p' Makefile | column -t -s @

# Prints its argument as an error, and fails.
fail = { echo "error: $(1)" >&2; exit 1; }
# Makes an environment, unless it is there.
environment = $(1)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(1) >/dev/null \
	  || $(call fail,$(1) cannot be made. Install python3-venv; or make this folder writable)
# Runs pip; its output is in a log.
install = $(1) $(PIP) $(2) >$(3).log 2>&1 \
	  || $(call fail,pip: $$(grep -m 1 ^ERROR $(3).log). Check the network and $(3).log)

$(VENV)/.ready: requirements.lock
	@[ "$$(uname -sm)" = "Linux x86_64" ] || $(call fail,this is $$(uname -sm); the locked packages are for Linux x86-64)
	@command -v git >/dev/null || $(call fail,git: not found. Install it)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	  || $(call fail,$(PYTHON) is $$($(PYTHON) -V 2>/dev/null || echo missing); Python 3.11 to 3.13 is needed. Run make PYTHON=python3.11)
	@[ "$$(df -Pk . | awk 'NR==2 {print $$4}')" -gt 3000000 ] || $(call fail,less than 3 GB of disk are free here)
	@echo "Setting up $(VENV) from requirements.lock: one to three minutes, 2 GB, once."
	@$(call environment,$(VENV))
	@$(call install,$(VENV)/bin/python,--requirement requirements.lock,$(VENV))
	@touch $@

repro: $(VENV)/.ready  ## run the pipeline: what changed, and what depends on it
	@echo "The embedded default takes 6 minutes on two cores, 13 to 22 on a CPU without bf16. Stopped, it resumes."
	@$(ENV) python -m stages.tools.repro
	@echo; echo "Next: . $(VENV)/bin/activate"
	@echo "      xdg-open reports/report.html"
	@echo "      make chat                      # talk to the tuned model"
	@echo "      dvc exp run -S lora.r=8        # one change; what does not depend on it is not run again"

chat: $(VENV)/.ready  ## talk to the tuned model in the terminal
	@$(ENV) python -m stages.tools.chat

# One process a file. The two that take longest come first: of a folder, pytest would drop them.
LONGEST := tests/test_pipeline.py tests/train/test_resuming.py
OTHERS = $(filter-out $(LONGEST),$(sort $(shell find tests -name 'test_*.py')))

test: $(VENV)/.ready  ## run the tests
	@$(ENV) python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
	  $(LONGEST) $(OTHERS)

$(AUDIT)/.ready: .ci/requirements.lock
	@$(call environment,$(AUDIT))
	@$(call install,$(AUDIT)/bin/python,--requirement .ci/requirements.lock,$(AUDIT))
	@touch $@

sbom: $(VENV)/.ready $(AUDIT)/.ready  ## list what is installed, as CycloneDX, in sbom.json
	@$(AUDIT)/bin/cyclonedx-py environment $(VENV) --pyproject pyproject.toml --output-reproducible -o sbom.json
	@echo "sbom.json: $$(grep -c '"purl"' sbom.json) packages"

audit: $(AUDIT)/.ready  ## look the locked packages up for known vulnerabilities (needs PyPI)
	@$(AUDIT)/bin/pip-audit --requirement requirements.lock --no-deps --disable-pip --format json \
	  --progress-spinner off 2>/dev/null | $(AUDIT)/bin/python .ci/audit.py

faults: $(VENV)/.ready  ## damage inputs, kill, fill the disk: 300 seeded tries (an hour)
	@$(ENV) python -m tests.faults.injector --tries 300

$(EMULATION)/.ready: $(VENV)/.ready
	@$(call install,$(VENV)/bin/python,--no-deps --upgrade --target $(EMULATION) $(TRITON),$(EMULATION))
	@touch $@

emulate: $(EMULATION)/.ready  ## run the tests of the GPU kernels on a CPU, by Triton's emulation
	@$(ENV) PYTHONPATH=$(EMULATION) TRITON_INTERPRET=1 python -m pytest tests/shared/step/test_kernels.py

lint: $(VENV)/.ready  ## ruff and mypy
	@$(ENV) ruff format --check .
	@$(ENV) ruff check .
	@$(ENV) mypy

$(EXTRAS)/.ready: requirements.lock benchmarks/requirements.lock
	@echo "Setting up $(EXTRAS), the peers among its packages: one to three minutes, 2 GB, once."
	@$(call environment,$(EXTRAS))
	@$(call install,$(EXTRAS)/bin/python,--requirement requirements.lock --requirement benchmarks/requirements.lock,$(EXTRAS))
	@touch $@

extras: $(EXTRAS)/.ready  ## run the tests that need more packages than the lock has
	@$(EXTRAS)/bin/python -m pytest tests/benchmarks

bench: $(EXTRAS)/.ready  ## measure the training step against trl's (an hour; needs the default's model)
	@$(EXTRAS)/bin/python -m benchmarks.train

plots: $(VENV)/.ready  ## let `dvc plots` draw offline (needs npm, once)
	@$(ENV) .dvc/plots_page.sh

format: $(VENV)/.ready  ## ruff, changing files
	@$(ENV) ruff format .
	@$(ENV) ruff check --fix .

clean:  ## remove the environments (data, models and DVC's cache stay)
	rm -rf $(foreach folder,$(VENV) $(EXTRAS) $(EMULATION) $(AUDIT),$(folder) $(folder).log)
