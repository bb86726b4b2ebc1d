# `make test` and `make demo` need only Python 3.10 to 3.12; everything else goes into .venv.
.PHONY: venv test lint demo real figures clean

BIN := .venv/bin

venv: .venv/ready

.venv/ready: pyproject.toml constraints.txt build_scripts/find_python.sh
	python=$$(PYTHON="$(PYTHON)" bash build_scripts/find_python.sh) && "$$python" -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

test: venv
	$(BIN)/python -m pytest -q

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

demo: venv
	$(BIN)/python build_scripts/build_engine.py --memshare --force
	$(BIN)/python benchmarks/inflight_batching.py --engine-dir engines/tiny_reasoner \
	  --dataset benchmarks/data/demo.jsonl --kv-cache-share 0.5 \
	  --variants full paper aligned lexical shadow drop-duplicate random streaming \
	  --output-json demo/report.json --plot demo/report.png

real: venv
	$(BIN)/python benchmarks/real_model.py

figures: venv
	bash benchmarks/figures.sh $(BIN)/python

clean:
	rm -rf .venv engines demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
