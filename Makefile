# `make study` and `make test` set everything up by themselves; `make help` lists the rest.
#
# PYTHON=...  the interpreter to build .venv with; else the newest >= 3.12 on PATH or under pyenv
# EXTRA=...   cpu, cuda or tpu; else chosen by the machine's devices
# ARGS=...    more arguments for the command, such as ARGS="--preset full"
SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PY := .venv/bin/python
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
WORKERS ?= auto
PYTEST := $(PY) -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile

# A TPU is a PCI device of Google's with one of the ids in jax._src.hardware_utils: their network card has the same vendor.
TPU_IDS := 0x0027|0x0056|0x005e|0x0062|0x0063|0x006f|0x0076|0x0083|0x007c
define DETECT
if ls /dev/accel[0-9]* /dev/vfio/[0-9]* >/dev/null 2>&1 && for d in /sys/bus/pci/devices/*; do \
	grep -qs 0x1ae0 "$$d/vendor" && grep -qsE '$(TPU_IDS)' "$$d/device" && echo yes; done | grep -q yes; \
then echo tpu; \
elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then echo cuda; \
else echo cpu; fi
endef
ifndef EXTRA
EXTRA := $(shell $(DETECT))
endif
ifeq ($(filter $(EXTRA),cpu cuda tpu),)
$(error EXTRA=$(EXTRA) must be cpu, cuda or tpu)
endif
DEVICE := $(if $(filter cuda tpu,$(EXTRA)),$(EXTRA)$(comma))
comma := ,

.PHONY: help study test test-all lint format format-check typecheck bench notebook device clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*##/\t/' | awk -F '\t' '{ printf "make %-13s%s\n", $$1, $$2 }'
	@sed -n '/^# [A-Z]*=/s/^# //p' Makefile

study: .venv/study-$(EXTRA) device  ## what each way to attend costs and remembers, here; writes runs/study/index.html
	$(PY) -m longattn study $(ARGS)

test: .venv/test-$(EXTRA) device  ## the default tests
	$(PYTEST) -m "not slow" $(ARGS)

test-all: .venv/test-$(EXTRA) device  ## the rest of the tests: the larger grids, the notebook in a fresh environment
	$(PYTEST) -m slow $(ARGS)

lint: .venv/test-$(EXTRA)  ## ruff's checks
	$(PY) -m ruff check .

format: .venv/test-$(EXTRA)  ## rewrite the sources in ruff's format
	$(PY) -m ruff format .

format-check: .venv/test-$(EXTRA)  ## fail if `make format` would change anything
	$(PY) -m ruff format --check .

typecheck: .venv/test-$(EXTRA)  ## mypy
	$(PY) -m mypy

bench: .venv/study-$(EXTRA) device  ## time attention against its rivals (LONGATTN_TORCH_PYTHON: an interpreter with torch)
	$(PY) -m longattn bench attention $(ARGS)

notebook: .venv/test-$(EXTRA)  ## run the notebook in a fresh environment, as CI does
	$(PY) -m pytest -m slow tests/test_notebooks.py $(ARGS)

device: .venv/study-$(EXTRA)  ## print the device; stop if an accelerator is there and jax sees only the CPU
	@$(PY) .ci/device.py $(EXTRA)

clean:  ## remove .venv and caches; runs/ stays
	rm -rf .venv build ./*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find longattn tests configs -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp names what is installed. The second waits for the first: two pips in one environment would collide.
.venv/study-$(EXTRA): .venv/created pyproject.toml constraints.txt
	@echo "Installing longattn for $(EXTRA) into .venv (once) ..."
	@$(INSTALL) -e ".[$(DEVICE)study]"
	@touch $@

.venv/test-$(EXTRA): .venv/study-$(EXTRA)
	@echo "Installing the test tools into .venv (once) ..."
	@$(INSTALL) -e ".[$(DEVICE)test]"
	@touch $@

# pyenv's shims exist for versions that do not run, and Debian's python3 may lack ensurepip: so each candidate is tried.
.venv/created:
	@for python in $(if $(PYTHON),"$(PYTHON)",python3.14 python3.13 python3.12 python3 python \
		"$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.*/bin/python); do \
		if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then \
			echo "Creating .venv with $$("$$python" -c 'import sys; print("Python", sys.version.split()[0], sys.executable)')"; \
			"$$python" -m venv --clear .venv && touch $@ && exit 0; \
			exit 1; \
		fi; \
	done; \
	echo "longattn: no Python >= 3.12 with venv was found$(if $(PYTHON), at PYTHON=$(PYTHON)). Install one" \
		"(apt install python3.12-venv, brew install python@3.12, pyenv install 3.12, or uv python install 3.12)" \
		"and, if it is not on PATH, say make PYTHON=/path/to/python3.12" >&2; \
	exit 1
