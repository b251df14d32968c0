# `make demo` runs the main job, `make test` passes the tests; both first create .venv and build what they need.

PYTHON ?= python3
TORCH ?= 2.13.0
VENV := .venv
# the Triton that PyTorch 2.11 brings, beside the newest
TORCH_2_11_TRITON := $(VENV)/triton-3.6.0
# frameworks that qpilots_fast.integrations drops into, beside the environment: they would bring their own torch
FRAMEWORKS := $(VENV)/frameworks
# the newest LeRobot wants another Python and another transformers than the rest of them
PYTHON_3_12 ?= python3.12
LEROBOT := $(VENV)/lerobot-0.6.1
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -name '*.cpp' -o -name '*.h')
CXX_FILES := $(shell find csrc tests bench -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-cpu test-pure test-interpreter test-emulator test-integrations test-lerobot sanitize lint \
  types docs bench profile format clean fuzz mutants soak sbom

demo: $(VENV)/.built
	$(BIN)/qpilots-fast demo

test: lint types $(TORCH_2_11_TRITON)
	$(BIN)/python -m pytest -q --durations=10
	$(BIN)/python -m bench.gpu_static --quick
	@if [ -d $(TORCH_2_11_TRITON)/triton ]; then \
	  PYTHONPATH=$(TORCH_2_11_TRITON) $(BIN)/python -m bench.gpu_static --quick --families triton --targets 80 90; \
	else echo "skipped: the Triton kernels were not compiled with 3.6.0, which pip did not find"; fi

# parts of the tests, for machines that do not run all of them: another architecture or torch, no compiler
test-cpu: $(VENV)/.built
	$(BIN)/python -m pytest -q $(addprefix tests/test_,backends.py chains.py chain_paths.py cpu_backend.py crowd.py \
	  edits.py finish.py inputs.py ops.py params.py quick_call.py sampler.py write_watch.py)

test-pure: $(VENV)/.built
	$(BIN)/python -m pytest -q $(addprefix tests/test_,reference.py steering.py heads.py objectives.py bounds.py \
	  inputs.py ops_conventions.py sampler.py)

test-interpreter: $(VENV)/.built
	$(BIN)/python -m pytest -q $(wildcard tests/test_triton_*.py)

test-emulator: $(VENV)/.built
	$(BIN)/python -m pytest -q $(wildcard tests/test_cuda_*.py)

test-integrations: $(VENV)/.built $(FRAMEWORKS)/.installed
	PYTHONPATH=$(FRAMEWORKS) $(BIN)/python -m pytest -q -rs tests/frameworks

test-lerobot: $(LEROBOT)/.installed
	PYTHONPATH=. $(LEROBOT)/bin/python -m pytest -q -rs tests/frameworks/test_lerobot.py

sanitize: $(VENV)/.built
	$(BIN)/pip install -q cmake ninja pybind11 setuptools
	PATH=$(abspath $(BIN)):$$PATH tests/sanitize.sh $(BIN)/python

# random samplers and calls against the float64 reference; a night: make fuzz N=1000000
N ?= 20000
fuzz: $(VENV)/.built
	$(BIN)/python -m tests.fuzz --calls $(N)

# plants faults in a copy of the sources, one after the other: which of them do the tests miss?
mutants: $(VENV)/.built
	$(BIN)/python -m tests.mutants

# does memory grow, or a call slow down, over many calls?
MINUTES ?= 60
soak: $(VENV)/.built
	$(BIN)/python -m bench.soak --minutes $(MINUTES)

# the software bill of materials of .venv, CycloneDX, in build/sbom.json
sbom: $(VENV)/.built
	$(PYTHON) -m venv $(VENV)/sbom && $(VENV)/sbom/bin/pip install -q cyclonedx-bom
	$(VENV)/sbom/bin/cyclonedx-py environment --mc-type library --pyproject pyproject.toml --output-reproducible \
	  -o build/sbom.json $(BIN)/python

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/vulture
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

types: $(VENV)/.built
	$(BIN)/mypy

# the site, in build/site; a link or a docstring that does not read well fails it
docs: $(VENV)/.built
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.built
	$(BIN)/pip install -q -e ".[peers]"
	$(BIN)/qpilots-fast bench --table targets

profile: $(VENV)/.built
	$(BIN)/qpilots-fast profile

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) build dist *.egg-info qpilots_fast/*.so qpilots_fast/_build_info.json

# torch first and pinned: a range could bring in a CUDA build of several gigabytes
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch==$(TORCH) numpy
	touch $@

$(TORCH_2_11_TRITON): $(VENV)/.torch
	$(BIN)/pip install -q --no-deps --target $@ triton==3.6.0 || mkdir -p $@

$(FRAMEWORKS)/.installed: tests/frameworks/requirements.txt $(VENV)/.torch
	$(BIN)/pip install -q --no-deps --target $(@D) -r $<
	touch $@

$(LEROBOT)/.installed: $(VENV)/.torch
	$(PYTHON_3_12) -m venv $(@D)
	$(@D)/bin/pip install -q torch==$(TORCH) numpy pytest safetensors rich transformers==5.5.4 diffusers==0.35.2 accelerate \
	  draccus==0.10.0 einops gymnasium jsonlines termcolor opencv-python-headless
	$(@D)/bin/pip install -q --no-deps lerobot==0.6.1 torchvision==0.28.0
	touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install -q -e ".[demo,bench,examples,triton,dev,docs]"
	touch $@
