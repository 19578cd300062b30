# Every target sets up what it needs; see scripts/setup. CONTRIBUTING.md says when to run which.
BIN := .venv/bin
LOWEST := .venv-lowest/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal
# What touches the libraries whose lowest versions are installed, and takes a minute or two.
LOWEST_TESTS := tests/test_document.py tests/test_configuration.py tests/processor tests/golden \
	tests/checkpoints/test_checkpoint.py tests/model/test_compatibility.py tests/generation/test_text.py \
	tests/cli/test_info.py tests/training/test_optimizer.py

.PHONY: demo test test-slow test-fast test-browser test-gpu lint format types lower-bounds docs notebook hooks benchmark clean

demo: .venv/ready
	$(BIN)/mmi generate examples/demo.json --output demo --seed 7 --overwrite
	@echo "Open demo/report.html in a browser."

test: .venv/ready-test
	$(PYTEST) -m "not slow and not browser"

test-slow: .venv/ready-test
	$(PYTEST) -m slow

test-fast: .venv/ready-test
	$(PYTEST) -m "not slow and not kernels and not browser" -k "not compile"

test-browser: .venv/ready-browser
	$(BIN)/python -m pytest -m browser tests/browser

test-gpu: .venv/ready
	$(BIN)/python -m pytest -m gpu

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: .venv/ready-tools
	$(BIN)/basedpyright

lower-bounds: .venv-lowest/ready
	$(LOWEST)/python -m pytest -n 2 $(LOWEST_TESTS)

docs: .venv/ready .venv-docs/ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet --strict
	@echo "Read it with: $(BIN)/python -m http.server --directory site"

notebook: .venv/ready-notebook
	$(BIN)/python scripts/run_notebooks.py

hooks: .venv/ready-tools
	$(BIN)/pre-commit install

benchmark: .venv/ready
	$(BIN)/mmi bench --preset small --device cpu --output benchmarks/results/small-cpu.json

clean:
	rm -rf .venv .venv-lowest .venv-docs demo site

.venv/ready: requirements.lock pyproject.toml scripts/setup
	scripts/setup .venv requirements.lock
	touch $@

.venv/ready-test: .venv/ready requirements-test.lock scripts/setup-test
	scripts/setup-test .venv
	touch $@

.venv/ready-browser: .venv/ready-test requirements-browser.lock scripts/setup-browser
	scripts/setup-browser .venv
	touch $@

.venv/ready-notebook: .venv/ready requirements-notebook.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-notebook.lock
	touch $@

.venv/ready-tools: .venv/ready-test requirements-tools.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-tools.lock
	touch $@

.venv-lowest/ready: requirements-lowest.lock pyproject.toml scripts/setup
	scripts/setup .venv-lowest requirements-lowest.lock
	touch $@

.venv-docs/ready: .venv/ready requirements-docs.lock
	$(BIN)/python -m venv --clear .venv-docs
	.venv-docs/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements-docs.lock
	touch $@
