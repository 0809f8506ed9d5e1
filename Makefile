# What a contributor runs; VENV names the virtual environment, ZOO a folder of models that tools/zoo/export.py made.
VENV ?= .venv
ZOO ?= zoo
BIN = $(VENV)/bin

.PHONY: help test lint docs site release bench

help:
	@echo "make test    run the tests"
	@echo "make lint    check style, types and layering, as CI does"
	@echo "make docs    write what is made from the code: docs/options.md, comq_onnx/options/keywords.py"
	@echo "make site    build the site to build/site, every warning an error; needs the extra docs"
	@echo "make release build a wheel, check it and run its demo in a fresh environment; needs the extra release"
	@echo "make bench   measure the solver, and the models of ZOO where that folder is"

test:
	$(BIN)/pytest

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs:
	$(BIN)/python tools/option_keywords.py > keywords.part && mv keywords.part comq_onnx/options/keywords.py
	$(BIN)/python tools/option_reference.py > options.part && mv options.part docs/options.md

site:
	$(BIN)/python tools/make_site.py

release:
	rm -rf dist build/fresh build/comq-demo
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	python3 -m venv build/fresh
	build/fresh/bin/pip install --quiet "$$(echo dist/*.whl)[cpu]" mypy
	cd build && fresh/bin/comq-onnx --demo
	cd build && fresh/bin/mypy --strict ../tests/typed/example.py --config-file /dev/null

bench:
	$(BIN)/python tools/bench/solve.py
	@if [ -d "$(ZOO)" ]; then $(BIN)/python tools/bench/suite.py "$(ZOO)"; \
	else echo "no models in $(ZOO): python tools/zoo/export.py $(ZOO) makes them"; fi
