# What a person types: `make demo`, `make test`, `make lint`. `make help` lists the rest.
# Everything is installed into .venv; nothing outside this folder is touched. GNU make 3.81 or later.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
BENCHMARKS ?= benchmarks/pipeline.py benchmarks/memory.py

# Through the environment, so that a path may hold spaces, quotes and dollar signs.
DEMO_SOURCE := $(value SOURCE)
export DEMO_SOURCE

# Where the shell forbids bytecode, each process of the tests would compile the library again.
export PYTHONDONTWRITEBYTECODE :=

# On a terminal pip shows its progress; in a log it would be a thousand lines.
PIP = $(BIN)/python -m pip $$([ -t 1 ] || echo --quiet) --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo install dev test test-all lint format schemas bench train-demo constraints clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed-base ## encode, mix and decode a small corpus; SOURCE=~/Music takes your own
	@if [ -n "$$DEMO_SOURCE" ]; then \
		case "$$DEMO_SOURCE" in "~" | "~/"*) DEMO_SOURCE="$$HOME$${DEMO_SOURCE#?}" ;; esac; \
		exec $(BIN)/latentmill demo "$$DEMO_SOURCE" $(ARGS); \
	else \
		exec $(BIN)/latentmill demo $(ARGS); \
	fi

install: $(VENV)/.installed-base ## install latentmill into .venv
	@echo "latentmill is installed: $(BIN)/latentmill --help"

dev: $(VENV)/.installed-dev ## install what tests and linters need, too

test: $(VENV)/.installed-dev ## run the tests in four processes; ARGS="-k store" goes to pytest
	$(BIN)/pytest -n 4 --dist loadfile $(ARGS)

test-all: $(VENV)/.installed-dev ## also the slow tests: ten kills, every fault, all recordings
	$(BIN)/pytest -m "slow or not slow" --timeout 1800 $(ARGS)

lint: $(VENV)/.installed-dev ## ruff check, ruff format --check, mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## format the code and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schemas: $(VENV)/.installed-base ## generate schemas/ and run/options.py from the code
	$(BIN)/python -m latentmill.store.schemas .

bench: $(VENV)/.installed-dev ## run the benchmarks
	@set -e; for script in $(BENCHMARKS); do \
		echo "$$script"; $(BIN)/python "$$script" $(ARGS); \
	done

train-demo: $(VENV)/.installed-dev ## train an autoencoder with and without linearity, and compare them
	$(BIN)/python examples/train_demo.py $(ARGS)

constraints: ## refresh constraints.txt: the newest versions, for every Python and platform at once
	@mkdir -p build
	$(PYTHON) -m venv build/uv
	build/uv/bin/python -m pip install --quiet --upgrade pip uv
	@sed '/^[^#]/,$$d' constraints.txt > build/constraints.txt
	build/uv/bin/uv pip compile --quiet --universal --python-version 3.11 --all-extras \
		--no-header --no-annotate --no-emit-index-url --no-emit-find-links \
		pyproject.toml >> build/constraints.txt
	mv build/constraints.txt constraints.txt

clean: ## remove caches, build folders and the demo's output; .venv stays
	rm -rf build dist demo train-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.created:
	@command -v $(PYTHON) > /dev/null || { \
		echo "latentmill needs Python 3.11 or newer, but there is no $(PYTHON): install it, or name one, as in: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "latentmill needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) -V 2>&1): name a newer one, as in: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
		echo "$(PYTHON) cannot make virtual environments: install its venv package, such as: apt install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade pip
	@touch $@

$(VENV)/.installed-base: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "Installing latentmill, PyTorch and Ray into $(VENV): about a minute and the download, once"
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "Installing latentmill and what its tests need into $(VENV): about a minute and the download, once"
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.installed-base $@
