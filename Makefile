# make book [PROFILE=laptop]   run every notebook at that profile, then build the site into _build/html
# make test                    lint, unit tests, notebooks against their committed outputs, strict build, browser
# make notebooks               refresh the committed `quick` outputs in notebooks/
# make bench                   time a training step beside floors, the plain loop and other libraries (eleven minutes on two idle cores)
# make keep                    put the times, numbers and frontiers of runs/ into book/results, which the site shows beside its own
# make links                   check the links to other sites (needs a network)
# make clean                   remove the built site
SHELL   := /bin/bash
PYTHON  ?= python3
VENV    ?= .venv
BIN     := $(VENV)/bin
# Other libraries take part in the benchmark where they are installed: `.venv/bin/pip install -e '.[peers]'`, or, to keep
# the versions of constraints.txt apart from theirs, the same in a second environment and BENCH_PYTHON=its/bin/python.
BENCH_PYTHON ?= $(BIN)/python
PROFILE ?= laptop
TEST_SITE := _build/test/_build/html

# On Linux without an NVIDIA driver torch comes from PyTorch's own index of CPU wheels (0.2 GB, not several);
# where that index can't be reached pip goes on with the indexes that it has.
CPU_INDEX := https://download.pytorch.org/whl/cpu
ifeq ($(shell uname -s),Linux)
ifeq ($(shell command -v nvidia-smi),)
TORCH_INDEX := --extra-index-url $(CPU_INDEX)
endif
endif

PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
BUILD_BOOK  := $(BIN)/jupyter-book build . -W -n --keep-going --quiet
step = @echo "[$$(date +%H:%M:%S)] $(1)"

.PHONY: book test notebooks bench keep links clean
.DELETE_ON_ERROR:

book: $(VENV)/.installed
	$(call step,running the notebooks at profile $(PROFILE) (finished runs are reused))
	@$(BIN)/python tools/run.py $(PROFILE)
	@$(BIN)/python tools/make_explorer.py $(PROFILE)
	$(call step,building the site)
	@rm -rf _build/html _build/.doctrees _build/jupyter_execute
	@BOOK_PROFILE=$(PROFILE) $(BUILD_BOOK)
	@$(BIN)/python tools/check_site.py _build/html
	$(call step,done: open _build/html/index.html)

test: export OMP_NUM_THREADS ?= 1
test: $(VENV)/.installed
	@$(BIN)/ruff check --quiet
	@$(BIN)/python tools/make_explorer.py quick
	$(call step,building the site from the committed outputs)
	@rm -rf _build/test
	@BOOK_PROFILE=committed $(BUILD_BOOK) --path-output _build/test
	@$(BIN)/python tools/check_site.py $(TEST_SITE)
	$(call step,testing)
	@SITE=$(TEST_SITE) $(BIN)/python -m pytest -n 2
	$(call step,done)

notebooks: export OMP_NUM_THREADS ?= 1
notebooks: $(VENV)/.installed
	@$(BIN)/python tools/run.py --refresh-committed

bench: $(VENV)/.installed
	@$(BENCH_PYTHON) -m saelib.bench --out saelib/rows/speed.jsonl

keep: $(VENV)/.installed
	@$(BIN)/python tools/keep.py

links: $(VENV)/.installed
	@BOOK_PROFILE=committed $(BIN)/jupyter-book build . --builder linkcheck --path-output _build/links

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call step,installing into $(VENV) (a few minutes the first time))
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) --retries 0 $(TORCH_INDEX) torch
	$(call step,torch is in; installing the rest)
	@$(PIP_INSTALL) -e '.[book,test,minilm]'
	@touch $@

clean:  # the runs, which took long, stay
	rm -rf _build
