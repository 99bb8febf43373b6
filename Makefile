# Everything a contributor runs, in one place. `make` alone prints the list.
# Needs python3 (>= 3.11), make and a package index; `make docs` and the browser tests also use npm (Node >= 18).

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
BIN    := $(VENV)/bin
WEB    := nbs/_web
READY  := $(VENV)/.installed
NPM    := $(WEB)/node_modules/.package-lock.json

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo reproduce test lab docs check prepare export clean rerun format tables readme hooks gpu-test survive bench distclean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# ---------------------------------------------------------------- for everybody

demo: $(READY) ## train a wRNN and an iRNN side by side, in minutes, and draw what they do
	$(BIN)/wrnn_demo

GRID    ?= $(if $(QUICK),quick,paper)
RESULTS ?= reproduced

reproduce: $(READY) ## train all runs of the tables into RESULTS=reproduced: hours on one GPU, QUICK=1 minutes; Ctrl-C, and again to go on
	$(BIN)/wrnn_sweep $(GRID) --results $(RESULTS) $(if $(DEVICE),--device $(DEVICE))
	$(BIN)/wrnn_tables --results $(RESULTS)

test: $(READY) ## run every notebook's assertions (nbdev_test), then pytest, both on all cores
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4 tests

lab: $(READY) ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs

docs: $(READY) $(NPM) ## build the documentation site into _docs
	$(PY) $(WEB)/build.py _docs

install: $(READY) ## make .venv and install the package into it (the other targets do this themselves)

# ---------------------------------------------------------------- for contributors

prepare: export clean format readme check ## what to run before a commit: export, clean, format, readme, check
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test

check: $(READY) ## is the house in order? export, clean and README without a diff, lint, no pickle, no machine paths
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PY) -m pytest -q tests/test_house.py

export: $(READY) ## write wave_rnns/*.py from the notebooks
	$(BIN)/nbdev_export

clean: $(READY) ## bring the notebooks into one form: no execution counts, no metadata, line by line (outputs stay)
	$(BIN)/nbdev_clean
	$(PY) $(WEB)/tidy.py

rerun: $(READY) ## run all notebooks, or NOTEBOOKS="nbs/...", and store what they show and how long each takes
	$(PY) $(WEB)/rerun.py $(NOTEBOOKS)

format: $(READY) ## format notebooks and tests with ruff (never wave_rnns, which is exported)
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format --quiet .

tables: $(READY) ## write nbs/results/tables from the records
	$(BIN)/wrnn_tables

readme: $(READY) ## write README.md from nbs/index.ipynb
	$(PY) $(WEB)/readme.py

hooks: $(READY) ## install git and Jupyter hooks that keep notebooks clean and merge them by cell
	$(BIN)/nbdev_install_hooks

gpu-test: $(READY) ## prove the GPU kernels against the float64 loop (needs an NVIDIA GPU) and record the result
	@for check in tests/gpu/check_*.py; do echo "$$check"; $(PY) $$check --out nbs/results/gpu || exit 1; done

survive: $(READY) ## kill, freeze and corrupt in earnest: 100 kills, 100 chaos sweeps, 100,000 fuzzed files (about an hour)
	WAVE_RNNS_KILLS=100 WAVE_RNNS_CHAOS=100 WAVE_RNNS_FUZZ=100000 WAVE_RNNS_RUN_ALL=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4 \
	  tests/test_resume_kill.py tests/test_data.py tests/test_chaos.py tests/test_fuzz.py tests/test_slurm.py tests/test_notebooks.py

bench: $(READY) ## measure speed on this machine
	$(BIN)/wrnn_bench

distclean: ## remove .venv, npm packages, the built site and caches
	rm -rf $(VENV) $(WEB)/node_modules _docs _proc build dist *.egg-info .pytest_cache tests/.pytest_cache .ruff_cache .hypothesis

# ---------------------------------------------------------------- installation

# The stamp is younger than settings.ini and setup.py when the installation is up to date.
$(READY): settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "wave_rnns needs Python 3.11 or newer, and '$(PYTHON)' is not. Name another one: make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) \
	  || { echo "'$(PYTHON) -m venv' failed. On Debian and Ubuntu: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }
	@echo "Installing wave_rnns and its tools into $(VENV) (PyTorch is several GB; this takes a few minutes) ..."
	@$(PY) -m pip install -qq --upgrade pip
	$(PY) -m pip install -qq --editable '.[dev]'
	@touch $@

$(NPM): $(WEB)/package.json $(WEB)/package-lock.json
	@command -v npm >/dev/null || { echo "make docs needs npm (Node >= 18): https://nodejs.org, or apt-get install nodejs npm"; exit 1; }
	npm ci --prefix $(WEB) --no-audit --no-fund --loglevel=error
	@touch $@
