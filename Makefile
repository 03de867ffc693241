# Each target is enough by itself on a machine with Python >= 3.11 and nothing else; the first run installs, later ones are quick.
#
#   make demo        check every public implementation found, then a wrong one
#   make test        the whole suite (no torch needed)
#   make test-peers  what compares with torch, JAX and public CPU implementations, in .venv-peers
#   make lint        ruff and mypy
#   make bench       the benchmarks on the CPU, once over: minutes (bench-full: all lengths, repeated)
#   make bench-gpu   those that need a device (and CuPy: .venv/bin/python -m pip install -e '.[cuda12]', or cuda13)
#   make bench-site  what was measured so far as pages, in asv_benchmarks/.asv/html
#   make docs        the documentation, in docs/_build/html
#
# PYTHON=/path/to/python chooses an interpreter. Without a GPU, point pip at a CPU build of torch for `make test-peers`
# (PIP_EXTRA_INDEX_URL=..., see pytorch.org), or it fetches several gigabytes of CUDA. On Linux x86-64 `make test` installs what
# compiles the GPU kernels, which needs no GPU.

PYTHON ?=
comma := ,
VENV := .venv
PEERS := .venv-peers
PIP := -m pip --disable-pip-version-check --quiet --quiet
COMPILE := $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),$(comma)compile)
ONE_THREAD := OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test test-peers lint bench bench-full bench-gpu bench-site docs clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(VENV)/bin/refimpl survey

test: $(VENV)/.test
	$(ONE_THREAD) $(VENV)/bin/pytest -n auto --dist worksteal --run slow

test-peers: $(PEERS)/.peers
	$(ONE_THREAD) $(PEERS)/bin/pytest -n auto --dist worksteal -m peers tests

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# --python=same: no environments are built and nothing is fetched; with the hash, results are kept for bench-site.
ASV = cd asv_benchmarks && ../$(VENV)/bin/asv
MEASURE = $(ASV) machine --yes > /dev/null && ../$(VENV)/bin/asv run --python=same --set-commit-hash=$$(git rev-parse HEAD) --show-stderr --launch-method forkserver

bench: $(VENV)/.bench
	$(MEASURE) --quick --bench '^(?!device)(?!host.*4096)(?!host\.Memory.* 64\))'

bench-full: $(VENV)/.bench
	$(MEASURE) --bench '^(?!device)'

bench-gpu: $(VENV)/.bench
	$(MEASURE) --bench '^device'

bench-site: $(VENV)/.bench
	$(ASV) publish
	$(VENV)/bin/python asv_benchmarks/site_of_asv.py

docs: $(VENV)/.docs
	$(ONE_THREAD) $(VENV)/bin/sphinx-build --quiet --fail-on-warning --keep-going $(SPHINXOPTS) docs docs/_build/html
	$(VENV)/bin/python docs/extension/check_html.py docs/_build/html

clean:
	rm -rf $(VENV) $(PEERS) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/python $(PEERS)/bin/python: | tools/venv.sh
	@sh tools/venv.sh $(@D:/bin=) $(PYTHON)

# A stamp says that the extras are in place; a changed pyproject.toml asks for them again.
$(VENV)/.demo: pyproject.toml $(VENV)/bin/python
	@echo "installing refimpl and ONNX's reference operators into $(VENV)"
	@$(VENV)/bin/python $(PIP) install --editable '.[onnx,flint]'
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/bin/python
	@echo "installing refimpl and its test tools into $(VENV)"
	@$(VENV)/bin/python $(PIP) install --editable '.[test$(COMPILE)]'
	@touch $@

$(VENV)/.lint: pyproject.toml $(VENV)/bin/python
	@echo "installing the linters into $(VENV)"
	@$(VENV)/bin/python $(PIP) install --editable '.[lint]'
	@touch $@

$(VENV)/.bench: pyproject.toml $(VENV)/bin/python
	@echo "installing asv into $(VENV)"
	@$(VENV)/bin/python $(PIP) install --editable '.[bench]'
	@touch $@

$(VENV)/.docs: pyproject.toml $(VENV)/bin/python
	@echo "installing Sphinx and its extensions into $(VENV)"
	@$(VENV)/bin/python $(PIP) install --editable '.[docs]'
	@touch $@

$(PEERS)/.peers: pyproject.toml tests/peers/requirements.txt tests/peers/requirements-no-deps.txt $(PEERS)/bin/python
	@echo "installing torch, JAX and public implementations into $(PEERS): this takes minutes"
	@$(PEERS)/bin/python $(PIP) install --requirement tests/peers/requirements.txt
	@$(PEERS)/bin/python $(PIP) install --no-deps --requirement tests/peers/requirements-no-deps.txt
	@$(PEERS)/bin/python $(PIP) install --editable '.[test]'
	@touch $@
