# Two cores and no GPU are enough for all of these.  make demo | test | check | clean
PYTHON ?= python3
BIN := .venv/bin
STORE := results/runs/demo

.PHONY: demo test check clean
.DELETE_ON_ERROR:

demo: .venv/installed  ## the whole loop on real text: build data, train, fit, tabulate, plot
	$(BIN)/dynconv submit experiments/sweeps/demo.toml --profile slurm/profiles/demo.toml --store $(STORE) --wait
	$(BIN)/dynconv fit $(STORE)
	@mkdir -p results/demo
	$(BIN)/dynconv table $(STORE) > results/demo/table.md
	@cat results/demo/table.md
	$(BIN)/dynconv plot $(STORE) -o results/demo

test: .venv/installed  ## every test this machine can run; what is skipped says why
	$(BIN)/python -m pytest -n auto --dist loadgroup

check: .venv/installed  ## lint, format, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:  ## everything made here but the results
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is wanted; got {v.major}.{v.minor}; set PYTHON=python3.x")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@
