.PHONY: setup demo test test-full lint bench glue faults

setup:
	@ci/setup

demo: setup
	@ci/demo

test: setup
	@ci/lint
	@ci/test -m "not full"

test-full: setup
	@ci/lint
	@ci/test --cov --cov-report=term # what the tests cover costs half as much again, so only here
	@ci/ascend
	@ci/peft -n 2
	@ci/audit || [ $$? = 3 ] # where the list of vulnerabilities can be reached
	@ci/faults

lint: setup
	@ci/lint

bench: setup
	@ci/bench

glue: setup
	@ci/glue

faults: setup
	@ci/faults
