# `make study` and `make test` set everything up by themselves; `make help` lists the rest.
#
# PYTHON=...  the interpreter to build .venv with; else the first >= 3.12 on PATH or under pyenv
# EXTRA=...   cpu, cuda or tpu; else chosen by the machine's devices
# ARGS=...    more arguments for the command, such as ARGS="--preset full"
SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Every job takes the whole machine, and two installers in one environment would collide.
.NOTPARALLEL:

PY := .venv/bin/python
WORKERS ?= auto
PYTEST := $(PY) -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# A TPU is one of Google's PCI devices (so is their network card): the ids are those of jax._src.hardware_utils.
TPU_IDS := 0x0027|0x0056|0x005e|0x0062|0x0063|0x006f|0x0076|0x0083|0x007c
define DETECT
if { ls /dev/accel[0-9]* || ls /dev/vfio/[0-9]*; } >/dev/null 2>&1 && \
	grep -lsw 0x1ae0 /sys/bus/pci/devices/*/vendor | sed 's/vendor$$/device/' | xargs -r grep -qswE '$(TPU_IDS)'; then \
	echo tpu; \
elif command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then \
	echo cuda; \
else \
	echo cpu; \
fi
endef
ifndef EXTRA
EXTRA := $(shell $(DETECT))
endif
ifeq ($(filter $(EXTRA),cpu cuda tpu),)
$(error EXTRA=$(EXTRA) must be cpu, cuda or tpu)
endif
DEVICE := $(PY) .ci/device.py $(EXTRA)
# $(call install,EXTRA OF pyproject.toml)
install = $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	-e ".[$(1)$(if $(filter cuda tpu,$(EXTRA)),$(comma)$(EXTRA))]"
comma := ,

# The compilers for TPUs and GPUs have a folder of their own: where jax finds them, every command on a machine without
# such a device complains that there is none.
COMPILERS := libtpu jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-cuda-nvdisasm
STATIC := LONGATTN_AOT="$(CURDIR)/.venv/aot"

.PHONY: help study plan profile profile-gpu test test-all test-oldest lint format format-check typecheck compare notebook docs device clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*##/\t/' | awk -F '\t' '{ printf "make %-13s%s\n", $$1, $$2 }'
	@sed -n '/^# [A-Z]*=/s/^# //p' Makefile

study: .venv/study-$(EXTRA)  ## what each way to attend costs and remembers, measured here
	@$(DEVICE)
	@$(if $(wildcard .venv/compilers),$(STATIC)) $(PY) -m longattn study $(ARGS)

plan: .venv/study-$(EXTRA) .venv/compilers  ## does a training step fit hardware you do not have: ARGS="llama3_8b --topology v5e:16x16"
	@$(STATIC) $(PY) -m longattn plan $(ARGS)

profile: .venv/study-$(EXTRA) .venv/compilers  ## static cycles of kernels on TPUs you do not have: ARGS="jax_flash --chips v6e"
	@$(STATIC) $(PY) -m longattn profile kernel --target tpu $(ARGS)

profile-gpu: .venv/study-$(EXTRA) .venv/compilers  ## registers, spills and instructions on GPUs you do not have: ARGS="jax_mgpu"
	@$(STATIC) $(PY) -m longattn profile kernel --target gpu $(ARGS)

test: .venv/test-$(EXTRA) .venv/compilers  ## the default tests
	@$(DEVICE)
	@$(STATIC) $(PYTEST) -m "not slow" $(ARGS)

test-all: .venv/test-$(EXTRA) .venv/compilers  ## the rest of the tests: the larger grids, the notebook in a fresh environment
	@$(DEVICE)
	@$(STATIC) $(PYTEST) -m slow $(ARGS)

# A file of tests is pytest's arguments, one a line.
OLDEST = PYTHONPATH=. .venv/oldest-$(1)/bin/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile \
	-p no:cacheprovider -W ignore::DeprecationWarning -m "not slow" @.ci/oldest/$(1).tests $(ARGS)
test-oldest: .venv/oldest-core/installed .venv/oldest-train/installed  ## a sample of the tests on the oldest jax, flax, optax, orbax and grain that are supported
	@$(call OLDEST,core)
	@$(call OLDEST,train)

lint: .venv/test-$(EXTRA)  ## ruff's checks
	$(PY) -m ruff check .

format: .venv/test-$(EXTRA)  ## rewrite the sources in ruff's format
	$(PY) -m ruff format .

format-check: .venv/test-$(EXTRA)  ## fail if `make format` would change anything
	$(PY) -m ruff format --check .

typecheck: .venv/test-$(EXTRA)  ## mypy
	$(PY) -m mypy

compare: .venv/study-$(EXTRA)  ## time attention against its rivals here: ARGS="attention_forward --with xla,jax_nn"
	@$(DEVICE)
	@$(PY) -m longattn compare $(if $(ARGS),$(ARGS),attention)

notebook: .venv/test-$(EXTRA)  ## run the notebook in a fresh environment, as CI does
	@$(PY) -m pytest -m slow tests/test_notebooks.py $(ARGS)

docs: .venv/docs  ## build the pages of docs/ into site/
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet $(ARGS)
	@echo "site/index.html"

device: .venv/study-$(EXTRA)  ## print the device; stop if there is an accelerator that jax does not see
	@$(DEVICE)

clean:  ## remove .venv and caches; runs/ stays
	rm -rf .venv build site ./*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find longattn tests configs -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp names what is installed; the test tools include what the study needs.
.venv/study-$(EXTRA): .venv/created pyproject.toml constraints.txt
	@echo "Installing longattn ($(EXTRA)) into .venv, once ..."
	@$(call install,study)
	@touch $@

.venv/test-$(EXTRA): .venv/created pyproject.toml constraints.txt
	@echo "Installing longattn ($(EXTRA)) and the test tools into .venv, once ..."
	@$(call install,test)
	@touch .venv/study-$(EXTRA) $@

# The pages are made from the sources without importing them, so this needs neither a device nor the study's packages.
.venv/docs: .venv/created pyproject.toml constraints.txt
	@echo "Installing what builds the documentation into .venv, once ..."
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch $@

.venv/oldest-%/installed: .venv/created pyproject.toml .ci/oldest/%.txt
	@echo "Installing the oldest versions ($*) into .venv/oldest-$*, once ..."
	@$(PY) -m venv --clear .venv/oldest-$*
	@.venv/oldest-$*/bin/python -m pip install --quiet --disable-pip-version-check -c .ci/oldest/$*.txt \
		-e ".$(if $(filter train,$*),[train])" pytest pytest-xdist beartype
	@touch $@

# One command for all: two of them share a folder, and pip replaces folders.
.venv/compilers: .venv/created constraints.txt
	@echo "Installing the compilers for TPUs and GPUs (about 1.2 GB) into .venv/aot, once ..."
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade -c constraints.txt \
		--target .venv/aot $(COMPILERS)
	@touch $@

# pyenv's shims exist for versions that do not run, and Debian's python3 may lack ensurepip: so each candidate is tried.
.venv/created:
	@for python in $(if $(PYTHON),"$(PYTHON)",python3.12 python3.13 python3.14 python3 python \
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
