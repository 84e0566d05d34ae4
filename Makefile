# make book   run every notebook with the mini profile and build the book    make test   linter, formatter, tests
# make look   look at the built book in Chromium, step through every notebook in a live kernel; what is missing for
#             either is named and skipped                                    make soak   the slow tests
# make clean  remove what these made; runs and stores of other profiles stay
# Each sets itself up: Python >= 3.11 and make are all that is needed. VENV=... puts the environment elsewhere.

VENV ?= .venv
PYTHON ?=
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed

.PHONY: book test look soak clean
.DELETE_ON_ERROR:

book: $(STAMP)
	$(BIN)/python -m decur_core.run mini
	$(BIN)/jupyter-book build . --all -W --keep-going
	@echo "The book: $(CURDIR)/_build/html/index.html"

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q

look: $(STAMP)
	$(BIN)/python -m pytest -q -rs tests/test_browser.py tests/test_live.py::test_every_notebook_can_be_stepped_through

soak: $(STAMP)
	$(BIN)/python -m pytest -q -m soak

# Installs once, and again when pyproject.toml changes or the interpreter behind the environment has gone.
$(STAMP): pyproject.toml
	@set -e; \
	if ! "$(BIN)/python" -c "" 2>/dev/null; then \
	  for python in $(PYTHON) python3.11 python3.12 python3.13 python3.14 python3 python; do \
	    "$$python" -c "import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))" 2>/dev/null && break; \
	    python=; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "No Python >= 3.11 with the venv module found (tried PYTHON=..., python3.11 to 3.14, python3, python)."; \
	    echo "Install one (Debian, Ubuntu: apt install python3.11-venv) or name it: make PYTHON=/path/to/python"; \
	    exit 1; \
	  fi; \
	  echo "Making $(VENV) with $$python"; \
	  "$$python" -m venv --clear "$(VENV)"; \
	fi
	@echo "Installing the packages that pyproject.toml pins: some GB, minutes without further output"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) _build runs/mini runs/start stores/mini stores/start book/executed/mini
	rm -rf .pytest_cache .ruff_cache *.egg-info
