# `make demo` and `make test` are each one command on a fresh clone: they install what they need into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help install test soak bench bench-gpu local-hub demo demo-full reproduce check-recipes quality generator clean-demo

help:
	@echo "make install    .venv with everything (PYTHON=python3.12 to choose; 3.11 or newer)"
	@echo "make demo       the whole pipeline on real images, on two CPU cores, in minutes"
	@echo "make demo-full  the table of the README: up to two hours, resumes when run again"
	@echo "make reproduce  RECIPE=cars MODEL=resnet18: the paper's experiment, resumable; DRY_RUN=1 prints what it takes"
	@echo "                (RECIPE: recipes/sets.yaml; MODEL: recipes/models.yaml; NUM_IMAGES=1000 CONTROL=1 CONFIG=...)"
	@echo "make check-recipes  whether the recipes' image sets on the Hub are as the recipes say; needs a network, no images"
	@echo "make test       the test suite"
	@echo "make soak       the checks that take too long for it"
	@echo "make bench      speed and memory of the scripts, into benchmarks/*.md; DIFFUSERS=<checkout> compares"
	@echo "                train_dsi.py, TRANSFORMERS=<checkout> train_bridged.py with the example scripts there"
	@echo "make bench-gpu  all that is worth knowing on a machine with a CUDA GPU, in MINUTES=8, into benchmarks/gpu.md;"
	@echo "                DIFFUSERS and TRANSFORMERS as above"
	@echo "make local-hub  a Hugging Face Hub on this machine, to try --push_to_hub without network"
	@echo "make quality    ruff: lint and format"
	@echo "make generator  train the demo's generator again (about an hour; needs Debian's dataset-fashion-mnist)"

install: $(VENV)/.installed

$(VENV)/.installed: requirements.txt constraints.txt demo/requirements.txt demo/build/classifier.py
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; choose one with PYTHON=" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -r demo/requirements.txt -c constraints.txt
	$(BIN)/python demo/build/classifier.py
	@touch $@

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

soak: install
	$(BIN)/python -m pytest -m soak

bench: install
	$(BIN)/python -m benchmarks.generate_speed
	$(BIN)/python -m benchmarks.generate_overhead
	$(BIN)/python -m benchmarks.generate_memory
	$(BIN)/python -m benchmarks.generate_scan
	$(BIN)/python -m benchmarks.dsi_cache
	$(BIN)/python -m benchmarks.dsi_memory
	$(BIN)/python -m benchmarks.decode_speed
ifdef DIFFUSERS
	$(BIN)/python -m benchmarks.dsi_speed --diffusers $(DIFFUSERS)
else
	@echo "Left out: the speed beside diffusers' own script; make bench DIFFUSERS=<checkout of diffusers>."
endif
ifdef TRANSFORMERS
	$(BIN)/python -m benchmarks.fine_tuning_speed --transformers $(TRANSFORMERS)
else
	@echo "Left out: the speed beside transformers' own script; make bench TRANSFORMERS=<checkout of transformers>."
endif

bench-gpu: install
	$(BIN)/python -m benchmarks.gpu --minutes $(or $(MINUTES),8) $(if $(DIFFUSERS),--diffusers $(DIFFUSERS)) \
		$(if $(TRANSFORMERS),--transformers $(TRANSFORMERS))

local-hub: install
	$(BIN)/python -m tests.local_hub

demo: install
	$(BIN)/python -m demo.run

demo-full: install
	$(BIN)/python -m demo.run --full

reproduce: install
	$(BIN)/python -m recipes.reproduce $(if $(RECIPE),--recipe $(RECIPE)) $(if $(MODEL),--model $(MODEL)) \
		$(if $(NUM_IMAGES),--num_images_per_class $(NUM_IMAGES)) $(if $(CONTROL),--control) \
		$(if $(DRY_RUN),--dry_run) $(if $(RATES),--rates $(RATES)) $(if $(CONFIG),--config_file $(CONFIG))

check-recipes: install
	$(BIN)/python -m recipes.check $(if $(RECIPE),--recipe $(RECIPE))

quality: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

generator: install
	$(BIN)/python demo/build/data.py
	$(BIN)/python demo/build/generator.py
	$(BIN)/python demo/build/few_steps.py

clean-demo:
	rm -rf demo/runs demo/runs-full
