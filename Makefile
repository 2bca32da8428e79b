# Every target sets up what it needs, in .venvs/X.Y of the interpreter that PYTHON names.
#
#   make test                               make test PYTHON=python3.13
#   make test ARGS="-k segments -x"         make test ARGS="--only box"
#   make test ARGS="--loop uvloop"          (or asyncio: the only one; both, if none is named)
#   make test ARGS="--scheme https"         (or http: the only way to S3; both, if none is named)
#   make test ARGS="--segments file"        (or memfd, syscall, stream: how large payloads travel)
#   make test ARGS="--random-order"         (says with which seed; --random-order-seed=N repeats it)
#   make soak ARGS="--report docs/soak.md"  (1,000,000 jobs; --jobs N, --seconds S, --seed X)
#   make fuzz ARGS="--seconds 600"          (each target; the corpus is kept in .fuzz)
#   make deploy                             (the zip and the template of examples/deploy)
#   make coverage                           (of all processes; the report is in .coverage-html)

PYTHON ?= python3
ARGS ?=

.PHONY: setup test demo bench soak fuzz coverage deploy lint types clean

setup test demo bench soak fuzz coverage deploy lint types:
	@$(PYTHON) -m tests.run $@ $(ARGS)

clean:
	rm -rf .venvs build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage* .fuzz
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
