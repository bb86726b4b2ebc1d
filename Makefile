# `make test` and `make demo` need only Python 3.10 to 3.12; everything else goes into .venv.
.PHONY: venv test nightly lint kernels resolve demo real figures vllm test-vllm test-vllm-newest test-transformers-4 aiperf clean

BIN := .venv/bin

venv: .venv/ready

.venv/ready: pyproject.toml constraints.txt build_scripts/find_python.sh
	python=$$(PYTHON="$(PYTHON)" bash build_scripts/find_python.sh) && "$$python" -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# The tests of the real server have the machine to themselves: their bounds are in seconds.
test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/triton_server
	$(BIN)/python -m pytest -q tests/triton_server

# Every test with its long parts (killed servers, a soak, AIPerf, thousands of schedules), then a minute of fuzzing for each of 18 parsers.
nightly: venv aiperf
	MEMSHARE_NIGHTLY=1 MEMSHARE_SCHEDULES=1000 MEMSHARE_SCHEDULE_OPERATIONS=200000 $(BIN)/python -m pytest -q
	$(BIN)/python tests/fuzz/run.py --seconds 60
	MEMSHARE_NIGHTLY=1 MEMSHARE_SCHEDULES=1000 $(MAKE) test-vllm
	$(MAKE) test-vllm-newest

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Compiles every kernel for every architecture; needs no GPU.
kernels: venv
	$(BIN)/python build_scripts/build_plugins.py --check

# `make venv` on Python 3.10 and 3.12, as far as finding versions goes: a pin that needs a newer Python shows up here.
resolve: venv
	bash build_scripts/resolve.sh

# One thread: the model is small, and two that wait for one another take many times as long once another program runs.
demo: venv
	$(BIN)/python build_scripts/build_engine.py --memshare --force
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/inflight_batching.py --engine-dir engines/tiny_reasoner \
	  --dataset benchmarks/data/demo.jsonl --kv-cache-share 0.5 \
	  --variants full pressure paper aligned lexical shadow drop-duplicate random streaming \
	  --output-json demo/report.json --plot demo/report.png

real: venv
	$(BIN)/python benchmarks/real_model.py

figures: venv
	bash benchmarks/figures.sh $(BIN)/python

# vLLM wants Python 3.11 here and other versions than we do: an environment of its own.
vllm: .venv-vllm/ready

.venv-vllm/ready: pyproject.toml constraints-vllm.txt
	python3.11 -m venv --clear .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-vllm.txt
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e .
	touch $@

test-vllm: vllm
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -q -n 2 --dist loadfile tests/vllm_plugin

# The newest vLLM, of which there is no build for CPUs: its Python code over the other one's operators.
test-vllm-newest: vllm
	bash build_scripts/test_vllm_release.sh 0.33.0

# The oldest transformers that is supported, and what it needs older versions of; the rest as everywhere.
.venv-transformers-4/ready: pyproject.toml constraints.txt constraints-transformers-4.txt build_scripts/find_python.sh
	python=$$(PYTHON="$(PYTHON)" bash build_scripts/find_python.sh) && "$$python" -m venv --clear .venv-transformers-4
	grep -vE '^(transformers|tokenizers|huggingface_hub)==' constraints.txt > .venv-transformers-4/constraints.txt
	.venv-transformers-4/bin/python -m pip install --quiet --disable-pip-version-check \
	  -c .venv-transformers-4/constraints.txt -c constraints-transformers-4.txt -e '.[dev]'
	touch $@

test-transformers-4: .venv-transformers-4/ready
	OMP_NUM_THREADS=1 .venv-transformers-4/bin/python -m pytest -q -n 2 --dist loadfile tests/runners tests/engine \
	  tests/builder tests/evaluation tests/triton_parts

# AIPerf wants newer versions than we do. With it the tests of both servers run it, and triton_serving takes it as load.
aiperf: .venv-aiperf/ready

.venv-aiperf/ready: constraints-aiperf.txt
	python3.11 -m venv --clear .venv-aiperf
	.venv-aiperf/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-aiperf.txt
	touch $@

clean:
	rm -rf .venv .venv-vllm .venv-transformers-4 .venv-aiperf engines demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
