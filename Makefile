# make book   run every notebook with the mini profile and build the book    make test   linter, formatter, tests
# make look   look at the built book in Chromium, step through every notebook in a live kernel; what is missing for
#             either is named and skipped                                    make soak   the slow tests
# make clean  remove what these made; runs and stores of other profiles stay
# Each sets itself up: Python >= 3.11 and make are all that is needed. VENV=... puts the environment elsewhere.

# Recipes take VENV from their surroundings, quoted, as the name of a folder may hold anything. No rule has a path of it
# as its target: make would take a space there for the end of the name.
VENV ?= .venv
PYTHON ?=
export VENV PYTHON
RUN := "$$VENV"/bin/python -m

.PHONY: book test look soak clean environment

book: environment
	$(RUN) decur_core.run mini --jobs 2
	"$$VENV"/bin/jupyter-book build . --all -W --keep-going
	@echo "The book: $(CURDIR)/_build/html/index.html"

test: environment
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	OMP_NUM_THREADS=1 $(RUN) pytest -q -n auto --dist loadfile --no-loadscope-reorder

look: environment
	OMP_NUM_THREADS=1 $(RUN) pytest -q -rs -n 2 tests/test_browser.py \
	  tests/test_live.py::test_every_notebook_can_be_stepped_through

soak: environment
	$(RUN) pytest -q -m soak

# Installs once, and again when pyproject.toml changes, the interpreter behind the environment has gone, or the
# environment was moved, after which its programs start no more. .decur marks an environment as made here: nothing else
# is cleared or removed. .installed holds its place.
environment:
	@set -e; \
	place() { cd "$$VENV" && pwd -P; }; \
	stays() { [ ! -s "$$VENV/.installed" ] || [ "$$(cat "$$VENV/.installed")" = "$$(place)" ]; }; \
	works() { "$$VENV/bin/python" -c "" && stays; }; \
	if [ -f "$$VENV/.installed" ] && [ ! pyproject.toml -nt "$$VENV/.installed" ] && works 2>/dev/null; then exit 0; fi; \
	if ! works 2>/dev/null; then \
	  if [ -e "$$VENV" ] && [ ! -f "$$VENV/.decur" ] && [ -n "$$(ls -A "$$VENV")" ]; then \
	    echo "$$VENV holds something else than an environment made here; remove it, or name another: make VENV=..."; \
	    exit 1; \
	  fi; \
	  for python in "$$PYTHON" python3.11 python3.12 python3.13 python3.14 python3 python; do \
	    "$$python" -c "import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))" 2>/dev/null && break; \
	    python=; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "No Python >= 3.11 with the venv module found (tried PYTHON=..., python3.11 to 3.14, python3, python)."; \
	    echo "Install one (Debian, Ubuntu: apt install python3.11-venv) or name it: make PYTHON=/path/to/python"; \
	    exit 1; \
	  fi; \
	  echo "Making $$VENV with $$python"; \
	  "$$python" -m venv --clear "$$VENV"; \
	  touch "$$VENV/.decur"; \
	fi; \
	echo "Installing the packages that pyproject.toml pins: some GB, minutes without further output"; \
	"$$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable '.[test]'; \
	(place) > "$$VENV/.installed"

clean:
	@if [ -f "$$VENV/.decur" ]; then rm -rf "$$VENV"; \
	elif [ -e "$$VENV" ]; then echo "$$VENV stays: it was not made here"; fi
	rm -rf _build runs/mini runs/start stores/mini stores/start book/executed/mini
	rm -rf .pytest_cache .ruff_cache decur_book.egg-info
