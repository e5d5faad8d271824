# Two targets do everything, set-up included: `make demo` and `make test`. Both are quick when run again.
# `make help` lists the others.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Markers, written last, so that an installation that was cut off starts again: the package, and the extra `test`.
READY := $(VENV)/.ready
TOOLS := $(VENV)/.tools
SITE_TOOLS := $(VENV)/.site-tools
PEERS := .venv-peers
WHEEL := build/wheel
DEMO := runs/digits
BENCHMARKS := attention_cost training_throughput data_scale sampling memory gpu

.PHONY: help demo test lint wheel docs release benchmark peers test-peers clean

demo: ## train on handwritten digits, sample and score them
test: ## lint and run all tests
lint: ## ruff and mypy
wheel: ## build the wheel and try it in an environment of its own
docs: ## build the site of the documentation in site/
release: ## build the distributions and check them with twine; nothing is uploaded
benchmark: ## measure speed and memory, on a machine that does nothing else
peers: ## install the models that some tests compare with
test-peers: ## tests with torchvision and timm; with DIFFUSERS=CLONE diffusers' own tests too
clean: ## remove environments, runs and builds

help:
	@grep -E '^[a-z-]+: ## ' Makefile | sed 's/: ## /\t/' | expand -t 12

demo: $(READY)
	@$(BIN)/dia demo --output_dir $(DEMO)
	@echo "Next, after \`. $(BIN)/activate\`:"
	@echo "  pip install --editable .[app] && dia app $(DEMO)    try the model in a browser"
	@echo "  dia sample $(DEMO) --class_label 7 --num_images 16 --output_dir sevens"
	@echo "  dia train --help                       train on your own images"

test: lint
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

lint: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The wheel, installed alone into an empty environment: the demo's commands run from it, in small. Dependencies are taken
# from $(VENV), which takes seconds where another installation takes minutes; that all of them are declared is a test's.
TINY := --block_out_channels 32 32 --layers_per_block 1 --max_train_steps 5 --score_num_images 20 --ddpm_num_inference_steps 2
SITE := -c "import site; print(site.getsitepackages()[0])"

wheel: $(READY)
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir $(WHEEL) .
	$(PYTHON) -m venv $(WHEEL)/venv
	$(BIN)/python $(SITE) > $$($(WHEEL)/venv/bin/python $(SITE))/dependencies.pth
	$(WHEEL)/venv/bin/python -m pip install --quiet --no-deps --ignore-installed $(WHEEL)/*.whl
	cd $(WHEEL) && venv/bin/python -c "import dia_diffusion as d; assert '$(WHEEL)/venv' in d.__file__, d.__file__"
	cd $(WHEEL) && venv/bin/dia --version
	cd $(WHEEL) && venv/bin/dia train $(TINY) --output_dir run
	cd $(WHEEL) && venv/bin/dia sample run --num_images 4 --steps 2 --output_dir out
	cd $(WHEEL) && venv/bin/dia evaluate run --num_images 20 --steps 2 --output metrics.json --report report.html
	cd $(WHEEL) && venv/bin/dia analyze run --num_images 8 --num_timesteps 2

benchmark: demo
	@for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py || exit 1; done
	@$(BIN)/python benchmarks/training_throughput.py --processes --output runs/benchmarks/processes.json
	@$(BIN)/python benchmarks/objectives.py $(DEMO)
	@$(BIN)/python benchmarks/measuring.py

# An environment of its own for the models of torchvision and timm: torchvision needs a CUDA build of torch (4 GiB).
peers:
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --requirement benchmarks/peers.txt

# Without the settings of the other tests, which need more than torch and diffusers.
test-peers: peers $(TOOLS)
	$(PEERS)/bin/python -m pytest --noconftest tests/models/test_torchvision_resnets.py tests/models/test_timm.py
	$(BIN)/python tools/peer_tests.py $(DIFFUSERS)

# mkdocstrings reads the source; nothing is imported.
docs: $(SITE_TOOLS)
	$(BIN)/mkdocs build --strict

release: $(TOOLS)
	rm -rf dist
	$(BIN)/python -m pip install --quiet --constraint constraints.txt build twine
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

$(READY): pyproject.toml constraints.txt
	@echo "Installing torch, diffusers and what else the demo needs into $(VENV): once, some minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable .
	@touch $@

$(TOOLS): $(READY)
	@echo "Adding what the tests need: ruff, mypy, pytest, Ray, Gradio, Playwright and others."
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	@touch $@

$(SITE_TOOLS): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	@touch $@

clean:
	rm -rf $(VENV) $(PEERS) runs build dist site *.egg-info
