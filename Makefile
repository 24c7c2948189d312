# make help shows what there is.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check

TESTS ?= tests
SOURCES := src tests setup.py native $(wildcard bench examples)
SANITIZED := build/sanitized
SANITIZED_ISAS ?= portable,avx2,avx512bf16,amx

.DEFAULT_GOAL := help
.PHONY: help quickstart install native test check sanitize format docs soak constraints clean

help:  ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: $(STAMPS)/run  ## install and see it work, without downloads of models
	@$(BIN)/python native/build.py > /dev/null || echo 'warning: going on without new kernels' >&2
	$(BIN)/decal quickstart --force

install: $(STAMPS)/dev $(STAMPS)/native  ## everything for working on decal, into .venv

native: $(STAMPS)/venv  ## compile the kernels anew where native/ changed
	$(BIN)/python native/build.py

test: $(STAMPS)/dev $(STAMPS)/native  ## all tests that need neither a GPU nor a network
	$(BIN)/python -m pytest -m 'not gpu and not slow' -n auto --maxprocesses 4 --dist loadfile $(TESTS)

sanitize: $(STAMPS)/dev  ## the kernels' tests with AddressSanitizer, UBSan and emulated tiles (gcc)
	$(BIN)/python native/build.py --sanitize $(SANITIZED) --emulate --isas $(SANITIZED_ISAS)
	for threads in 1 2; do \
	  env DECAL_NATIVE=$(SANITIZED)/_native.so DECAL_TEST_THREADS=$$threads \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="$$($(BIN)/python native/build.py --preload)" \
	    $(BIN)/python -m pytest -m 'not gpu and not slow' -s tests/kernels || exit 1; \
	done

check: $(STAMPS)/dev  ## format, lint, types, architecture, docs
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/clang-format --dry-run -Werror native/*.cpp native/*.h
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py tests/test_public_api.py tests/test_docs.py

format: $(STAMPS)/dev  ## rewrite the sources in the project's format
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/clang-format -i native/*.cpp native/*.h

docs: $(STAMPS)/dev  ## write docs/run.yaml from the settings
	$(BIN)/decal init - > docs/run.yaml.new && mv docs/run.yaml.new docs/run.yaml

soak: $(STAMPS)/dev $(STAMPS)/native  ## the slow tests too
	$(BIN)/python -m pytest -m 'not gpu' tests

constraints: $(STAMPS)/dev  ## pin what .venv holds now in constraints.txt
	{ echo '# The versions that decal is developed and tested with: pip install -c constraints.txt .'; \
	  echo '# Written by `make constraints`.'; \
	  $(PIP) freeze --exclude-editable | grep -E '^[A-Za-z0-9_.-]+==' \
	  | sed 's/+[a-z0-9.]*$$//' | grep -viE '^(nvidia|triton|cuda)'; } > constraints.new
	mv constraints.new constraints.txt

clean:  ## remove .venv, caches and what quickstart left
	rm -rf $(VENV) build dist quickstart .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f src/decal/kernels/_native.so
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Installed once: a stamp is older than constraints.txt, pyproject.toml or setup.py only when they
# changed. Installing compiles the kernels, and `native` finds its objects already made.
$(STAMPS)/venv:
	@test -n '$(PYTHON)' || { \
	  echo 'error: decal needs Python 3.11 or newer, and none was found' >&2; \
	  echo 'hint: make PYTHON=/path/to/python3.11 $(or $(MAKECMDGOALS),quickstart)' >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: decal needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1)" >&2; \
	  echo 'hint: make PYTHON=/path/to/python3.11 $(or $(MAKECMDGOALS),quickstart)' >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS) && touch $@

$(STAMPS)/run: $(STAMPS)/venv constraints.txt pyproject.toml setup.py
	$(PIP) install --quiet -c constraints.txt -e .
	touch $@

$(STAMPS)/dev: $(STAMPS)/venv constraints.txt pyproject.toml setup.py
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMPS)/run $@

$(STAMPS)/native: $(STAMPS)/venv $(wildcard native/*)
	$(BIN)/python native/build.py
	touch $@
