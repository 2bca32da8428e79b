# Every target sets up what it needs, in .venvs/X.Y of the interpreter that PYTHON names.
#
#   make test                               make test PYTHON=python3.13
#   make test ARGS="-k segments -x"         make test ARGS="--only box"
#   make test ARGS="--segments file"        (or memfd, syscall, stream: how large payloads travel)

PYTHON ?= python3
ARGS ?=

.PHONY: setup test demo bench lint types clean

setup test demo bench lint types:
	@$(PYTHON) -m tests.run $@ $(ARGS)

clean:
	rm -rf .venvs build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
