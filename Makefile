# Two cores and no GPU are enough for all of these.  make demo | test | check | clean
PYTHON ?= python3
BIN := .venv/bin
STORE := results/runs/demo

.PHONY: demo test check clean
.DELETE_ON_ERROR:

demo: .venv/installed  ## the whole loop on real text: build data, train, fit, tabulate, plot, report
	@echo 'Training 24 small models on the text of the standard library: minutes on two idle cores.'
	$(BIN)/dynconv submit experiments/sweeps/demo.toml --profile slurm/profiles/demo.toml --store $(STORE) --wait
	$(BIN)/dynconv fit $(STORE)
	@mkdir -p results/demo
	$(BIN)/dynconv table $(STORE) > results/demo/table.md
	@cat results/demo/table.md
	$(BIN)/dynconv plot $(STORE) -o results/demo
	$(BIN)/dynconv report $(STORE) -o results/demo/report.html
	@echo "$$WHAT_TO_LOOK_AT"

define WHAT_TO_LOOK_AT

What to look at:
  results/demo/loss-against-compute.svg  the picture: held-out loss against training FLOPs, a line for each arm; the
                                         lower line reaches the same loss with less compute
  results/demo/report.html               the report, for a browser: what may be claimed, every figure, every run
  results/demo/table.md                  the table above: m is the compute of the plain Transformer that reaches an arm's
                                         loss, over the arm's own; above 1 the arm saves compute
"not resolved" is no failure: with two seeds at four sizes of 25 to 110 thousand parameters, chance alone moves m by more
than such a difference, and an interval that holds 1 says so. Nor do losses over so short a range show where they level
off: then `fit` finds its E at a bound. To resolve either takes more and larger runs:
  dynconv power results/runs/demo        how many, for a given m, with the noise of these runs; with guessed noise
                                         before any run, as of experiments/sweeps/mini-scaling.toml, for one GPU
To go on, `. .venv/bin/activate`; README.md has the loop command by command.
endef
export WHAT_TO_LOOK_AT

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
	@echo 'Installing PyTorch and some 120 packages into .venv: about 3 GB on disk, more where torch brings the CUDA'
	@echo 'libraries. That takes minutes, by the network; pip is silent meanwhile.'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@
