# make demo         learn three small tasks with two methods and see what was forgotten
# make test         lint, type check and the default test suite
# make test-slow    the tests that take minutes
# make test-play    the tests of the page and of the endpoint that are asked, which need Gradio and what it brings
# make test-newest  the default test suite with the newest versions that pyproject.toml allows
# make lock         take today's newest versions into requirements.lock; run the tests before you commit it
# make bench        measure speed and memory side by side; needs a quiet machine, ten minutes on a CPU
# Everything is set up in .venv (the newest versions in .venv-newest); nothing global is touched.

PYTHON ?= python3
BIN := .venv/bin
PARALLEL := -n auto --maxprocesses 4 --dist loadscope --no-loadscope-reorder
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-slow test-play test-newest lock bench lint clean help

help:
	@sed -n 's/^# //p' Makefile

.venv/run: pyproject.toml requirements.lock tools/install.py src/dymoe/_imports.py
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing dymoe into .venv (1.6 GB with torch for CPUs; minutes without a word) ..."
	@$(BIN)/python tools/install.py
	@touch $@

.venv/dev: .venv/run
	@echo "Installing the development tools into .venv ..."
	@$(BIN)/python tools/install.py --dev
	@touch $@

demo: .venv/run
	@$(BIN)/dymoe demo

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest $(PARALLEL)

test-newest:
	@rm -rf .venv-newest
	@$(PYTHON) -m venv .venv-newest
	@echo "Installing dymoe with the newest versions into .venv-newest; these differ from the lock:"
	@.venv-newest/bin/python tools/install.py --newest
	.venv-newest/bin/python -m pytest $(PARALLEL)

lock: .venv/dev
	$(BIN)/python tools/lock.py

test-slow: .venv/dev
	$(BIN)/python -m pytest -m slow --timeout 3000

#	Gradio wants an older Pillow than the rest, so it gets an environment of its own on top of .venv.
.venv/play/ready: .venv/dev requirements-play.lock
	@echo "Installing Gradio into .venv/play ..."
	@$(BIN)/python -m venv .venv/play
	@$(BIN)/python tools/install.py --on-top .venv/play play
	@touch $@

test-play: .venv/play/ready
	.venv/play/bin/python -m pytest tests/play

bench: .venv/dev
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/evaluation.py --dtype bfloat16 --name evaluation-bfloat16
	$(BIN)/python benchmarks/pipeline.py

clean:
	rm -rf .venv .venv-newest build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
