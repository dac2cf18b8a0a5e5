# `make demo` and `make test` need nothing but Python >= 3.11 (venv, headers), a C++ compiler and make: each makes .venv,
# installs the pinned packages and builds the kernels first, from whatever state it finds.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
SOURCES := pyproject.toml constraints.txt setup.py CMakeLists.txt recog_fast/_version.py tools/environment.sh $(shell find csrc cmake -type f)
export PYTHON
unexport PYTHONPATH PYTHONHOME

.PHONY: help demo test docs sanitize sanitize-threads bench bench-full bench-charts check-kernels lint build wheel sdist check-wheel clean

help:
	@echo "make demo    train and evaluate on synthetic identities (2 minutes), write runs/demo/report.html"
	@echo "make test    run the tests            make bench   run the benchmarks"
	@echo "make docs    the documents as a site in build/docs, its links checked"
	@echo "make bench-full    the real sizes, in pieces        make bench-charts    charts and a page of all stored results"
	@echo "make sanitize   the operations' tests on kernels built with the address and undefined-behaviour sanitizers"
	@echo "make sanitize-threads   the kernels' own threads under the thread sanitizer (4 minutes)"
	@echo "make check-kernels   compile the Triton kernels for every architecture; registers, spills, shared memory"
	@echo "make lint    ruff and mypy --strict   make build   .venv with the built package"
	@echo "make wheel   dist/*.whl               make sdist   dist/*.tar.gz"
	@echo "make check-wheel   both built offline, looked into, installed in a fresh environment and used (docs/wheels.md)"
	@echo "make clean   remove everything built but .venv and runs"

demo: build
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} $(PY) -m recog_fast demo $(ARGS)

test: build
	$(PY) -m pytest $(ARGS)

# Installs the packages of the extra `docs` first, which nothing else needs.
docs: build
	@PY=$(PY) sh tools/docs.sh $(ARGS)

sanitize: build
	@PY=$(PY) sh tools/sanitize.sh $(ARGS)

sanitize-threads: build
	@PY=$(PY) sh tools/sanitize_threads.sh

bench: build
	$(PY) -m pytest benchmarks $(ARGS)
	@$(PY) -m benchmarks.charts --page

# Every piece in a process of its own, about an hour on 2 cores; ARGS="64x100000" runs the pieces whose id holds that word.
bench-full: build
	$(PY) -m benchmarks $(ARGS)

bench-charts: build
	$(PY) -m benchmarks.charts $(ARGS)

# No GPU needed; about 2 minutes on 2 cores.
check-kernels: build
	$(PY) -m recog_fast.triton_kernels.check $(ARGS)

lint: build
	$(PY) -m ruff check .
	$(PY) -m mypy --strict

wheel: build
	rm -rf build/lib*
	$(PY) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

sdist: build
	$(PY) -c "from setuptools.build_meta import build_sdist; build_sdist('dist')"

check-wheel: build
	$(PY) tools/check_wheel.py $(ARGS)

# The stamp follows the C++ sources and the pins; a look at .venv finds what a stamp cannot know.
build:
	@if [ -e $(VENV)/.installed ]; then $(PY) tools/check_venv.py || rm -f $(VENV)/.installed; fi
	@$(MAKE) --silent --no-print-directory $(VENV)/.installed

$(VENV)/.installed: $(SOURCES)
	@sh tools/environment.sh

clean:
	rm -rf build dist *.egg-info recog_fast/_native*.so $(VENV)/.installed
	rm -rf .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis
	find recog_fast triton_kernels tests benchmarks tools -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
