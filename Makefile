# make setup   virtual environment in .venv with everything the project needs
# make test    set up, run the tests
# make check   set up, lint, run those tests that train nothing and draw little: under a minute
# make demo    set up, compare a 3x3 branch with none and with its control on the embedded data set; table, heatmap, explorer
# make docs    set up, make the guide and the reference as a site: site/index.html
# make package set up, build and check what a package index takes: dist/
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
WORKERS := --numprocesses auto --maxprocesses 8 --dist worksteal

QUICK := branches compare correlation cost face files injection kernel_plots layers mixers packaging \
	provenance pure_mlp rand_augment reading reparam repmlp_block resizing sizes table_parts throughput_plot trained_on
.PHONY: setup test check demo lint docs package lock clean
setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --constraint requirements.lock --editable '.[all]'
	touch $@

test: setup
	$(RUN) -m pytest $(WORKERS)

check: lint
	$(RUN) -m pytest $(WORKERS) $(QUICK:%=tests/test_%.py)

demo: setup
	$(RUN) experiments/ablate.py +sweep=demo hydra/launcher=joblib hydra.launcher.n_jobs=2 trainer.threads=1
	$(RUN) analysis/make_tables.py --study demo
	$(RUN) analysis/plot_curves.py demo
	$(RUN) analysis/plot_kernels.py --study demo
	$(RUN) analysis/explore_kernels.py --study demo

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

docs: setup
	$(RUN) docs/site.py

# A source archive and a wheel in dist/, checked as a package index does.
package: setup
	rm -rf dist
	$(RUN) -m build
	$(RUN) -m twine check --strict dist/*

# Pin what is installed now; the markers keep the pins to the Pythons that they were resolved for.
lock: setup
	{ echo '# made by `make lock`'; $(RUN) -m pip freeze --exclude-editable | grep -v '^repmlp' \
	| sed 's/$$/ ; python_version >= "3.11" and sys_platform == "linux"/'; } > requirements.lock
	touch $(VENV)/.ready

clean:
	rm -rf $(VENV) outputs results/demo
