# make demo   the whole backend on this machine, asked three questions
# make test   all tests
# `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
UV_VERSION := 0.13.8
UV := $(or $(shell command -v uv 2>/dev/null),.tools/bin/uv)
RUN := $(UV) run --frozen
# These judge instead of measuring, for many minutes: each has its own target only.
BENCHES := $(filter-out ledger order waiting,$(patsubst benchmarks/%.py,%,$(wildcard benchmarks/[a-z]*.py)))

.DEFAULT_GOAL := help
.PHONY: help sync demo up servers test check fmt protos bench clean

help: ## list the targets
	@grep -hE '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.tools/bin/uv:
	@echo "installing uv $(UV_VERSION) into .tools"
	@mkdir -p .tools/bin
	@$(PYTHON) -m venv .tools/venv 2>/dev/null && .tools/venv/bin/python -m pip install "uv==$(UV_VERSION)" \
	  || $(PYTHON) -m pip install --target .tools/lib "uv==$(UV_VERSION)" \
	  || { echo "Python has neither venv nor pip: install one of them (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@if [ -x .tools/venv/bin/uv ]; then ln -sf ../venv/bin/uv $@; else ln -sf ../lib/bin/uv $@; fi

sync: $(filter .tools/bin/uv,$(UV)) ## install everything into .venv
	@$(UV) sync --frozen

demo: sync ## start everything, ingest examples/handbook, ask three questions, stop
	@$(RUN) python examples/demo.py

up: sync ## start everything and stay in the foreground
	@$(RUN) plexus up

servers: sync ## build the servers and the foreign clients that tests run, once a machine
	@$(RUN) python -m tests.servers

secrets: sync ## make the secrets of docker-compose.yml that are missing, in secrets/
	@$(RUN) python -m tools.compose_secrets

test: servers ## all tests; SEED=2 for another order (pytest alone takes a new one each time)
	@$(RUN) pytest -n 4 --dist loadfile --no-loadscope-reorder \
	  --randomly-seed=$(or $(SEED),1) --reruns 1 --rerun-show-tracebacks -raR

check: sync ## what CI checks: format, lint, types, boundaries, protos
	@$(RUN) ruff format --check .
	@$(RUN) ruff check .
	@$(RUN) mypy services clients/python tests tools examples benchmarks
	@$(RUN) lint-imports
	@$(RUN) python tools/generate.py --check
	@$(RUN) python -m tools.handbook --check
	@$(RUN) buf lint
	@$(RUN) buf format -d --exit-code protos
	@$(RUN) python tools/breaking.py

fmt: sync ## format Python and protos
	@$(RUN) ruff format .
	@$(RUN) ruff check --fix --exit-zero --quiet .
	@$(RUN) python tools/generate.py >/dev/null
	@$(RUN) buf format -w protos

protos: sync ## regenerate generated/ from protos/, and the reference pages of the handbook
	@$(RUN) python tools/generate.py
	@$(RUN) python -m tools.handbook

bench: sync ## all benchmarks; RECORD=1 writes what they say to benchmarks/results/
	@$(RUN) python benchmarks/_suite.py $(if $(RECORD),--record) $(BENCHES)

bench-queue: bench-queueing

bench-order: sync ## order per key over 100,000 messages, consumers that refuse and die
bench-waiting: sync ## a million messages that wait, far delays, equal delays, a paused consumer
bench-ledger: sync ## nothing lost under faults, 10 minutes a backend; SECONDS=60 SEED=1
	@$(RUN) python benchmarks/ledger.py $(if $(SECONDS),--seconds $(SECONDS)) $(if $(SEED),--seed $(SEED))

bench-%: sync ## one: bench-start, bench-call, bench-answers
	@$(RUN) python benchmarks/$(subst -,_,$*).py

clean: ## remove what was built (not the state of `plexus up`)
	@rm -rf .venv .build .tools dist .mypy_cache .ruff_cache .pytest_cache
