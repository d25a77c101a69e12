# Each target sets itself up in .venv; all it needs is make and Python >= 3.10.
# Another interpreter: make PYTHON=python3.12 test
.DELETE_ON_ERROR:
.NOTPARALLEL: # two targets at once would set up one environment twice
.PHONY: fast test test-images fuzz lint demo evidence evidence-real docs clean

# Images need torchvision, beside which the tests' environment would not stay as it is.
IMAGES := $(filter evidence test-images,$(MAKECMDGOALS))
ifneq ($(filter demo,$(MAKECMDGOALS)),)
IMAGES += $(findstring digits,$(ARGS))
endif
VENV := $(if $(strip $(IMAGES)),.venv-vision,.venv)
FOR_IMAGES := eval,plots,vision
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 10))'
CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11 python3.10
# Each is run, not looked up: a shim on the PATH may stand for a version that is not installed.
PYTHON ?= $(shell for p in $(CANDIDATES); do \
	if $$p $(NEW_ENOUGH) 2>/dev/null; then echo $$p; break; fi; done)
NAME_ONE := name one: make PYTHON=/path/to/python3

# Processes that run tests; each has torch and mergekit in memory, about 1 GiB.
WORKERS ?= 2
# The versions to install; /dev/null: the newest of everything.
CONSTRAINTS ?= constraints.txt

# Editable installs see changes to the package at once, but for what is copied to site-packages or
# recorded at install time.
COPIED := pyproject.toml constraints.txt Makefile mergekit_monosoup/__init__.py \
	$(wildcard _mergekit_monosoup_autoload/*.*)
INSTALL := $(VENV)/bin/python -m pip install --disable-pip-version-check \
	--constraint $(CONSTRAINTS)

# The tests of a file stay in one process, with what they share. One thread each: two processes of
# two threads on two cores wait for each other.
PYTEST := $(VENV)/bin/python -m pytest
TOGETHER := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 \
	$(PYTEST) --numprocesses $(WORKERS) --dist loadfile

# While working; after each change.
fast: $(VENV)/ready-test
	$(TOGETHER) -m "not slow and not alone" $(ARGS)

# Where those are that need the machine to themselves; finding them by importing all tests takes
# half a minute.
ALONE := $(or $(ARGS),$$(grep --recursive --files-with-matches 'mark\.alone' tests --include '*.py'))

# Everything: first what may run together, then what needs the machine to itself, whatever became
# of the first. ARGS may select tests of one part only: pytest exits with 5 where there are none.
test: $(VENV)/ready-test
	@together=0; alone=0; \
	$(TOGETHER) -m "not alone" $(ARGS) || together=$$?; \
	$(PYTEST) -m alone $(ALONE) || alone=$$?; \
	case $$together,$$alone in 0,0|0,5|5,0) ;; *) exit 1 ;; esac

# Those that need timm and torchvision; `make test` skips them.
test-images: $(VENV)/ready-vision-test
	$(TOGETHER) $$(grep --recursive --files-with-matches 'importorskip("timm"' tests) $(ARGS)

# Damaged and hostile input for every command, new each time; CASE=SUBJECT-NUMBER repeats one.
MINUTES ?= 10
fuzz: $(VENV)/ready-test
	OMP_NUM_THREADS=1 FUZZ_MINUTES=$(MINUTES) FUZZ_SEED=$(SEED) FUZZ_CASE=$(CASE) \
	$(PYTEST) --capture no tests/fuzz $(ARGS)

lint: $(VENV)/ready-lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

demo: $(VENV)/ready-$(if $(strip $(IMAGES)),$(FOR_IMAGES),plots)
	$(VENV)/bin/python -m demo $(ARGS)

evidence: $(VENV)/ready-$(FOR_IMAGES)
	$(VENV)/bin/python -m evaluation.evidence $(ARGS)

# On real weights and real text, which an extra brings.
evidence-real: $(VENV)/ready-evidence
	$(VENV)/bin/python -m evaluation.evidence --world tweets $(ARGS)

# The pages as a site, in build/site; Python >= 3.11.
docs: $(VENV)/ready-docs
	PYTHONPATH=docs $(VENV)/bin/python -m website

# setuptools: some dependencies (rouge-score, sqlitedict, word2number) come as source only, and a
# new environment's own setuptools is too old to build them without isolation, or not there
# (Python >= 3.12).
# ready-X: the extra X is installed. `unfinished` lies in the environment while pip works, so that
# one interrupted half-way is thrown away instead of being trusted.
$(VENV)/ready-%: $(COPIED)
	@test -n "$(PYTHON)" || { echo "make: no Python >= 3.10 found; $(NAME_ONE)" >&2; exit 1; }
	@$(PYTHON) $(NEW_ENOUGH) \
		|| { echo "make: $(PYTHON) is not Python >= 3.10; $(NAME_ONE)" >&2; exit 1; }
	@if test -e $(VENV)/unfinished; then \
		echo "An earlier set-up did not finish: starting over."; rm -rf $(VENV); fi
	$(PYTHON) -m venv $(VENV)
	@touch $(VENV)/unfinished
	$(INSTALL) hatchling setuptools
	$(INSTALL) --no-build-isolation --editable '.[$*]'
	@rm $(VENV)/unfinished
	@touch $@

clean:
	rm -rf .venv .venv-vision build dist demo-out evidence-out fuzz-out .hypothesis .mypy_cache .pytest_cache .ruff_cache .cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
