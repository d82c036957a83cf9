# Two commands do all their own set-up on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3.11
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check

.PHONY: quickstart test test-ranks test-others sweep gpu lint clean

quickstart: $(VENV)/.installed
	$(VENV)/bin/speft quickstart $(ARGS)

test: $(VENV)/.installed
ifeq ($(strip $(ARGS)),)
	$(MAKE) --no-print-directory --keep-going -j2 test-ranks test-others
else
	$(VENV)/bin/python -m pytest $(ARGS)
endif

# Tests start hundreds of processes, each of which would compile the package anew where this is set.
export PYTHONDONTWRITEBYTECODE =

# Two at a time: tests that run on ranks keep both cores busy only now and then. The launcher's port is one a
# machine, so all that start it are on one side; of the rest, these make up for the difference.
BESIDE := $(patsubst %,tests/distributed/test_%.py,plan salience experts optimizers families classification)

test-ranks:
	$(VENV)/bin/python -m pytest tests/distributed $(patsubst %,--ignore=%,$(BESIDE))

test-others:
	$(VENV)/bin/python -m pytest tests/unit tests/slurm $(BESIDE)

# Every family of models, which takes half an hour; writes the table of docs/models.md.
sweep: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -s tests/sweep $(ARGS)

# Tests and benchmarks of a GPU, in under ten minutes; without one, a rehearsal on the CPU.
gpu: $(VENV)/.installed
	$(VENV)/bin/python benchmarks/gpu.py $(ARGS)

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/lint-imports

# torch first, at its pinned version: resolved with the rest, a bare `torch` would bring another build.
# DS_BUILD_OPS=0: DeepSpeed compiles the one small op it needs at its first start.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "$$(grep '^torch==' constraints.txt)"
	DS_BUILD_OPS=0 $(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) *.egg-info
