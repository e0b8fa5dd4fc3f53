# What there is to run. PYTHON=python3.11 make setup chooses another interpreter.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: help setup test fast lint mutants fuzz claims bench gpu

help:  ## this text
	@grep -hE '^[a-z]+:.*##' Makefile | sed 's/:.*##/\t/'

setup:  ## a virtual environment in .venv with the pinned versions and the project itself
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -r requirements.txt
	$(BIN)/pip install --no-deps -e .

test:  ## the tests that run by default, on two cores
	$(BIN)/python -m pytest -n 2

fast:  ## the tests of the losses, the data and the command line that need no training
	$(BIN)/python -m pytest -x tests/test_contract.py tests/test_data.py tests/lab/test_check.py tests/lab/test_flags.py

lint:  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

mutants:  ## every single edit of a loss makes a test fail (many minutes)
	$(BIN)/python -m pytest -n 2 -m mutants

fuzz:  ## random and hostile files, checkpoints, command lines and kills (CASES=10000 is hours)
	$(BIN)/python -m pytest -m fuzz tests/fuzz.py --fuzz-cases $(or $(CASES),300)

claims:  ## the claims of all papers on five seeds, in two processes, into out/
	$(BIN)/python train.py --method all --claim --jobs 2

bench:  ## the speed of a training step, side by side with a peer where it is installed
	$(BIN)/python bench.py

gpu:  ## what needs a card, in five minutes: runs, step times and the tests, into out/gpu/
	$(BIN)/python tests/gpu.py
