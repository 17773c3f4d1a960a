# Everything runs in .venv, made here where there is none. Python 3.11 or later is all it takes.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Compiling the hosts' modules takes half a minute: let Python keep the result, whatever the shell says.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo test test-slow test-exhaustive test-gpu sanitize-gpu test-scale hostile check exports quality docs dist clean

setup: $(READY)

$(READY): pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements.lock --editable '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/vision-plugin demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# The longer proofs: more cases of the same matrices, real models, a browser, whole jobs.
test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow

# Every architecture name, every lesson, compiled kernels: before a release.
test-exhaustive: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m exhaustive

# On a machine with a GPU: what computes on a device does so there.
test-gpu: $(READY)
	$(BIN)/python -m pytest --device cuda -m "not scale"
	$(BIN)/python -m benchmarks.gpu

# The same kernels under NVIDIA's compute-sanitizer: reads past the end, then races.
SANITIZED := -q --device cuda tests/kernels/test_operators.py -k "not compiled and not exported and not opcheck"
sanitize-gpu: $(READY)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --target-processes all --error-exitcode 1 $(BIN)/python -m pytest $(SANITIZED)
	compute-sanitizer --tool racecheck --target-processes all --error-exitcode 1 $(BIN)/python -m pytest $(SANITIZED)

# Real clusters whose workers, nodes, head and driver are killed, and one SAE over several workers.
test-scale: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m scale

# The whole hostile corpus, and a thousand kills: two hours on two cores.
hostile: $(READY)
	$(BIN)/python -m benchmarks.hostile
	$(BIN)/python -m benchmarks.kills

# Hours on two cores. PEERS names the Python of an environment that has the peers; the script says how.
quality: $(READY)
	$(BIN)/python -m benchmarks.quality --peers "$(PEERS)"

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

exports: $(READY)
	$(BIN)/python tests/metrics_stub.py

# The site, into build/site: strict, and nothing is fetched.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: $(READY)
	rm -rf dist
	$(BIN)/python -m build --installer uv --outdir dist .
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf .venv demo-results build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
