# One entry per habit. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Ray starts two to three times slower when no process may keep its bytecode.
unexport PYTHONDONTWRITEBYTECODE
export RAY_USAGE_STATS_ENABLED := 0
export PATH := $(abspath $(BIN)):$(PATH)

CONFIG ?= configs/demo.yaml
RUNS ?= runs
MLFLOW_PORT ?= 5000
PACKAGES := jobs pipeline model

.PHONY: help setup train test test-faults test-sweeps simulate lint format types imports check bench bench-report submit ui mlflow lock clean

help:  ## list the entries
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup:  ## virtual environment from requirements.lock (skipped while the lock is unchanged)
	@PYTHON="$(PYTHON)" VENV="$(VENV)" bash .ci/setup

train: setup  ## prepare, train and evaluate on the shapes data set (CPU, minutes); CONFIG=..., ARGS='--key value'
	@$(BIN)/python jobs/train.py --config $(CONFIG) $(ARGS)

test: setup  ## all tests, on a CPU; ARGS='tests/model -k anchors'
	@$(BIN)/python -m pytest $(ARGS)

test-faults: setup  ## trainings that are killed, frozen, starved, 50 minutes; ARGS='-k frozen', CHAOS_KILLS=20
	@$(BIN)/python -m pytest -m faults tests/faults $(ARGS)

test-sweeps: setup  ## whole sweeps, one of them killed and begun again, minutes
	@$(BIN)/python -m pytest -m sweeps tests/jobs/test_tune.py $(ARGS)

lint: setup  ## ruff: rules and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: setup  ## let ruff rewrite the formatting
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

types: setup  ## mypy, strict
	@$(BIN)/mypy $(PACKAGES) benchmarks tests

imports: setup  ## the import contracts: jobs -> pipeline -> model
	@$(BIN)/lint-imports

check: lint types imports test  ## everything that has to be green before a commit

bench: setup  ## the quick form of every benchmark of a CPU, beside its peers, to benchmarks/results
	@$(BIN)/python benchmarks/cpu.py --quick --budget 600 --out benchmarks/results
	@$(BIN)/python benchmarks/memory.py --quick --json benchmarks/results/memory.json
	@$(BIN)/python benchmarks/ray_overhead.py --quick --json benchmarks/results/ray_overhead.json

bench-report:  ## README's table of performance, from benchmarks/results
	@$(BIN)/python benchmarks/report.py

submit: setup  ## the demo as a Ray job: start a head node on the loopback, submit, follow, end it
	@$(BIN)/python jobs/submit.py --config $(CONFIG) --storage_path $(RUNS) --run.name submitted $(ARGS)

ui: setup  ## MLflow pages of the local runs, on http://127.0.0.1:5000; MLFLOW_PORT=...
	@mkdir -p $(RUNS)
	@$(BIN)/python -c 'import socket; socket.create_server(("127.0.0.1", $(MLFLOW_PORT)))' 2>/dev/null || \
	  { echo "port $(MLFLOW_PORT) is taken; try make ui MLFLOW_PORT=5001"; exit 1; }
	@latest='select experiment_id from runs order by start_time desc limit 1'; \
	  id=$$($(BIN)/python -c 'import sqlite3, sys; print(*sqlite3.connect(sys.argv[1]).execute(sys.argv[2]).fetchone())' \
	    $(RUNS)/mlflow.db "$$latest" 2>/dev/null || echo 1); \
	  echo "MLflow starts, which takes half a minute; then open"; \
	  echo "  http://127.0.0.1:$(MLFLOW_PORT)/#/experiments/$$id/runs?workflowType=machine_learning   (Ctrl-C ends it)"
	@PYTHONWARNINGS=ignore $(BIN)/mlflow ui --host 127.0.0.1 --port $(MLFLOW_PORT) --workers 1 \
	  --uvicorn-opts "--log-level warning" --backend-store-uri sqlite:///$(abspath $(RUNS))/mlflow.db

mlflow: setup  ## MLflow server for jobs of several machines to try: sqlite and files in runs/, http://127.0.0.1:5000
	@mkdir -p $(RUNS)
	@$(BIN)/mlflow server --host 127.0.0.1 --port $(MLFLOW_PORT) --workers 1 \
	  --backend-store-uri sqlite:///$(abspath $(RUNS))/mlflow.db --artifacts-destination $(abspath $(RUNS))/mlflow-artifacts

simulate: setup  ## all jobs through `ray job submit` on two nodes that are simulated on the loopback; minutes
	@$(BIN)/python -m pytest -m simulation tests/simulation $(ARGS)

lock:  ## write requirements.lock anew from pyproject.toml (needs uv)
	@uv pip compile pyproject.toml --extra development --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-emit-find-links --no-annotate --no-header --quiet --output-file requirements.lock

clean:  ## remove caches; the environment and runs/ stay
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
