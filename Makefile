# Each target works on a fresh clone: it installs what it needs into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help install test soak docs bench bench-gpu local-hub demo demo-full bridge reproduce check-recipes quality generator clean-demo

help:
	@echo "To try it, and for your own work"
	@echo "  make install        install everything into .venv; PYTHON=python3.12 chooses (3.11 or newer)"
	@echo "  make bridge         IMAGES=photos (or a dataset id): from your images to a report, resumes when run again;"
	@echo "                      DRY_RUN=1 prints hours and disk space first. Also NUM_IMAGES=200 DROP_SHARE=0.1 CONFIG=..."
	@echo "                      OUTPUT=..., and DSI=... SYNTHESIS=... COMPARISON=...: files with more flags"
	@echo "  make demo           run the whole pipeline on real images: minutes on two CPU cores, no network needed"
	@echo "  make demo-full      compute the demo's table in docs/results.md; up to two hours, resumes when run again"
	@echo "  make clean-demo     delete what the two above wrote"
	@echo "  make local-hub      start a Hugging Face Hub on this machine, to try --push_to_hub without a network"
	@echo ""
	@echo "To reproduce the paper"
	@echo "  make reproduce      RECIPE=cars MODEL=resnet18: one of the paper's experiments, resumes when run again;"
	@echo "                      DRY_RUN=1 prints what it takes. RECIPE: see recipes/sets.yaml, MODEL: recipes/models.yaml."
	@echo "                      Also NUM_IMAGES=1000 CONTROL=1 RATES=... CONFIG=..."
	@echo "  make check-recipes  compare the recipes with their datasets on the Hub; needs a network, downloads no images"
	@echo ""
	@echo "To change the code"
	@echo "  make test           run the tests: minutes on two cores"
	@echo "  make soak           run the tests that are too slow for it"
	@echo "  make quality        check the code with ruff"
	@echo "  make docs           write docs/reference.md from the scripts' flags"
	@echo "  make bench          measure speed and memory, into benchmarks/*.md. DIFFUSERS=<checkout> compares with"
	@echo "                      diffusers' example script, TRANSFORMERS=<checkout> with that of transformers"
	@echo "  make bench-gpu      the same for a machine with a CUDA GPU, in MINUTES=8, into benchmarks/gpu.md"
	@echo ""
	@echo "To build the demo"
	@echo "  make generator      train the demo's diffusion model again: about an hour; needs Debian's dataset-fashion-mnist"

install: $(VENV)/.installed

$(VENV)/.installed: requirements.txt constraints.txt demo/requirements.txt demo/build/classifier.py
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; $(PYTHON) is " + sys.version.split()[0] + ". Choose another one with PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -r demo/requirements.txt -c constraints.txt
	$(BIN)/python demo/build/classifier.py
	@touch $@

test: install
	$(BIN)/python -m pytest -n 3 --dist loadfile

soak: install
	$(BIN)/python -m pytest -m soak

docs: install
	$(BIN)/python -m docs.build_reference

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
	@echo "Skipped: the speed compared with diffusers' script. Run make bench DIFFUSERS=<checkout of diffusers>."
endif
ifdef TRANSFORMERS
	$(BIN)/python -m benchmarks.fine_tuning_speed --transformers $(TRANSFORMERS)
else
	@echo "Skipped: the speed compared with transformers' script. Run make bench TRANSFORMERS=<checkout of transformers>."
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

# as environment variables, which may hold any character
bridge: install
	@$(if $(IMAGES),,echo "IMAGES is missing: make bridge IMAGES=photos, a folder with a subfolder per class" >&2; exit 2)
	$(BIN)/python -m recipes.bridge --images "$$IMAGES" $(if $(NUM_IMAGES),--num_images_per_class "$$NUM_IMAGES") \
		$(if $(DROP_SHARE),--drop_share "$$DROP_SHARE") $(if $(DRY_RUN),--dry_run) \
		$(if $(DSI),--dsi_recipe "$$DSI") $(if $(SYNTHESIS),--synthesis_recipe "$$SYNTHESIS") \
		$(if $(COMPARISON),--comparison_recipe "$$COMPARISON") $(if $(CONFIG),--config_file "$$CONFIG") \
		$(if $(OUTPUT),--output_dir "$$OUTPUT")

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
