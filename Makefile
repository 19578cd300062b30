# `make demo` and `make test` set everything up themselves; see scripts/setup.
BIN := .venv/bin

.PHONY: demo test test-gpu lint format benchmark clean

demo: .venv/ready
	$(BIN)/mmi generate examples/demo.json --output demo --seed 7 --overwrite
	@echo "Open demo/report.html in a browser."

test: .venv/ready-test
	$(BIN)/python -m pytest -n 2

test-gpu: .venv/ready
	$(BIN)/python -m pytest -m gpu

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmark: .venv/ready
	$(BIN)/mmi bench --preset small --device cpu --output benchmarks/results/small-cpu.json

clean:
	rm -rf .venv demo

.venv/ready: requirements.lock pyproject.toml scripts/setup
	scripts/setup .venv
	touch $@

.venv/ready-test: .venv/ready requirements-test.lock scripts/setup-test
	scripts/setup-test .venv
	touch $@
