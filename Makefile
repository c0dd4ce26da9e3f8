PYTHON ?= python3
VENV_PYTHON := .venv/bin/python
# A worker holds torch and a model: more than 8 buy memory use, not speed.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN); \
	if [ "$$n" -gt 8 ]; then echo 8; else echo "$$n"; fi)

.PHONY: help setup quickstart test test-originals test-torch lint clean

help:
	@echo 'make quickstart  set up, then train and test three small models'
	@echo 'make test        set up, then run all tests'
	@echo 'make test-originals  the tests that touch a host, with the original'
	@echo '                 packages in an environment of their own'
	@echo 'make test-torch TORCH=2.6.0  the tests that need no compiled operators'
	@echo '                 of mmcv, with another torch in an environment of its own'
	@echo 'make setup       make .venv with the tested set of packages'
	@echo 'make lint        check the style'
	@echo 'make clean       remove build and cache files (.venv stays)'
	@echo
	@echo 'Variables: PYTHON=python3.11  QUICKSTART_ARGS=...  PYTEST_ARGS=...'
	@echo '           WORKERS=2'
	@echo 'More on the set-up: $(PYTHON) tools/setup_env.py --help'

setup:
	@command -v '$(PYTHON)' >/dev/null || { echo 'set-up: error: no $(PYTHON)' \
		'on PATH; name a Python 3.10 to 3.12: make PYTHON=...' >&2; exit 1; }
	@'$(PYTHON)' tools/setup_env.py

quickstart: setup
	@$(VENV_PYTHON) tools/quickstart.py $(QUICKSTART_ARGS)

# One thread a worker: the workers themselves fill the cores. Neighbours stay
# with one worker, which makes the fixtures of a module once.
test: setup
	OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -n $(WORKERS) \
		--dist worksteal -q $(PYTEST_ARGS)

test-originals: setup
	OMP_NUM_THREADS=1 $(VENV_PYTHON) tools/test_originals.py -n $(WORKERS) \
		-q $(PYTEST_ARGS)

test-torch: setup
	@test -n '$(TORCH)' || { echo 'test-torch: error: name a release:' \
		'make test-torch TORCH=2.6.0' >&2; exit 1; }
	OMP_NUM_THREADS=1 $(VENV_PYTHON) tools/test_torch.py $(TORCH) \
		-n $(WORKERS) -q $(PYTEST_ARGS)

lint: setup
	$(VENV_PYTHON) -m ruff check .

clean:
	rm -rf build dist .pytest_cache .ruff_cache *.egg-info
	find mmrpa tools tests configs -name __pycache__ -prune \
		-exec rm -rf {} + 2>/dev/null || true
