# A fresh machine needs Python 3.11 or newer and make; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
DEMO := work/demo

# One thread a worker: workers that also share out their matrices wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: demo about-demo test quick coverage check bench docs clean

demo: about-demo .venv/installed
	$(BIN)/python cli.py run recipes/demo.toml --data $(DEMO)/challenge --work $(DEMO) --open

about-demo:
	@test -e .venv/installed || echo "First the installation into .venv, once: about 3 minutes and 7.2 GB of disk, most of it PyTorch."
	@echo "Then the demo: about 2 to 3 minutes on two cores, longer beside other work, and 2.9 GB of disk in $(DEMO)."

test: .venv/installed
	$(PYTEST)

# The tests that compute in less than half a second, without files
quick: .venv/installed
	$(PYTEST) -m 'not slow'

# Every test, and the lines that none of them reaches; a third slower
coverage: .venv/installed
	$(PYTEST) --cov

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy featcache heads cli.py
	$(BIN)/lint-imports

# QUICK=--quick: small sizes, to see that everything runs
bench: .venv/installed
	$(BIN)/pip install --quiet --editable '.[all,bench]'
	PYTHONPATH=. $(BIN)/python benchmarks/suite.py $(QUICK) --page docs/benchmarks.md

# The site, into site/: open site/index.html. Notebooks and pictures are made first, a minute or two; no network.
docs: .venv/installed
	PYTHONPATH=. $(BIN)/python docs/site/make_pages.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Editable, so that changed code needs no new install; a changed pyproject.toml does.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[all]'
	touch $@

clean:
	rm -rf .venv work build site *.egg-info
