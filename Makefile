# make demo | test | check | docs | gauntlet | mutants | install | kernels | kernels-check: what CI calls and what the README says.
VENV   := .venv
PYTHON := $(VENV)/bin/python
PIP    := $(PYTHON) -m pip install --quiet --disable-pip-version-check
# The CPU build of torch where the index has one; a bare "torch" may pull gigabytes of CUDA packages.
TORCH  ?= torch==2.13.0

# The compiled kernels need a C++ compiler; all else works without.
HAS_COMPILER := $(shell command -v $(CXX) 2>/dev/null)

.PHONY: install test fast check demo docs gauntlet mutants clean kernels kernels-check kernels-check-arm kernels-check-valgrind

install: $(VENV)/.installed kernels

$(VENV)/.installed: pyproject.toml
	python3 -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) -e '.[demo,dev]'
	touch $@

ifeq ($(HAS_COMPILER),)
kernels kernels-check:
	@echo "no C++ compiler ($(CXX)): the kernels are not built, everything else works"
else
kernels: $(VENV)/.kernels

$(VENV)/.kernels: $(VENV)/.installed $(shell find kernels -type f)
	@$(PIP) ./kernels && touch $@ || echo "the kernels did not build; everything else works"

# 10,000 random cases on every processor path, and damaged files, under the address and undefined-behaviour sanitizers; then threads
# under the thread sanitizer; some cases under valgrind, which sees numbers that nobody wrote and has AVX2 at most; and the path of ARM
# under an emulator. The last two only where valgrind, or a cross compiler and qemu, are installed.
BUILD = $(VENV)/bin/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja -S kernels -DSFK_TESTS=ON
ARM = aarch64-linux-gnu
kernels-check: $(VENV)/.installed
	$(PIP) 'cmake>=3.20' ninja
	$(BUILD) -B $(VENV)/kernels-check -DSFK_SANITIZE=address,undefined
	$(VENV)/bin/cmake --build $(VENV)/kernels-check
	$(VENV)/kernels-check/check 10000
	$(VENV)/kernels-check/check_encoder 300
	$(VENV)/kernels-check/fuzz_packed 100000
	$(BUILD) -B $(VENV)/kernels-threads -DSFK_SANITIZE=thread
	$(VENV)/bin/cmake --build $(VENV)/kernels-threads --target check_encoder
	$(VENV)/kernels-threads/check_encoder 40
	@if command -v valgrind >/dev/null; then $(MAKE) kernels-check-valgrind; else echo "no valgrind: nothing is run under it"; fi
	@if command -v $(ARM)-g++ >/dev/null && command -v qemu-aarch64-static >/dev/null; then $(MAKE) kernels-check-arm; \
	else echo "no $(ARM)-g++ or qemu-aarch64-static: the path of ARM is not checked"; fi

VALGRIND = valgrind -q --error-exitcode=9 --leak-check=full
kernels-check-valgrind: $(VENV)/.installed
	$(PIP) 'cmake>=3.20' ninja
	$(BUILD) -B $(VENV)/kernels-plain
	$(VENV)/bin/cmake --build $(VENV)/kernels-plain
	$(VALGRIND) $(VENV)/kernels-plain/check 300
	$(VALGRIND) $(VENV)/kernels-plain/check_encoder 20
	$(VALGRIND) $(VENV)/kernels-plain/fuzz_packed 1000

kernels-check-arm: $(VENV)/.installed
	$(PIP) 'cmake>=3.20' ninja
	$(BUILD) -B $(VENV)/kernels-arm -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(ARM)-g++
	$(VENV)/bin/cmake --build $(VENV)/kernels-arm --target check check_encoder
	qemu-aarch64-static -L /usr/$(ARM) $(VENV)/kernels-arm/check 1000
	qemu-aarch64-static -L /usr/$(ARM) $(VENV)/kernels-arm/check_encoder 60
endif

test: install
	$(PYTHON) -m pytest -n auto --dist loadfile --no-loadscope-reorder

fast: install
	$(PYTHON) -m pytest -n auto --dist loadfile --no-loadscope-reorder -m 'not slow'

check: install
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

demo: install
	$(VENV)/bin/slimformer demo --out demo

docs: $(VENV)/.docs
	$(PYTHON) results/tables.py
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict
	@echo "the site is in site/: open site/index.html, or run $(VENV)/bin/mkdocs serve"

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) -e '.[docs]'
	touch $@

gauntlet: install
	$(PYTHON) benchmarks/gauntlet.py --out gauntlet.jsonl

mutants: $(VENV)/.mutants
	$(PYTHON) benchmarks/mutants.py --out mutants.jsonl

$(VENV)/.mutants: $(VENV)/.installed
	$(PIP) -e '.[mutants]'
	touch $@

clean:
	rm -rf $(VENV) demo site
