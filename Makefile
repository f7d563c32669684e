VENV ?= .venv
PYTHON ?= python3
PY = $(VENV)/bin/python
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo '  VENV=DIR and PYTHON=INTERPRETER choose the environment, ARGS="..." is passed on by demo, test and bench.'

setup: ## make the environment in .venv: torch, Detectron2, this package, the tools
	@VENV="$(VENV)" PYTHON="$(PYTHON)" bash scripts/setup.sh

demo: setup ## make small datasets of photographs; train a Mask R-CNN and a video classifier on them
	$(PY) -m demo.detection --output datasets/demo
	$(PY) -m demo.motion --output datasets/motion
	DETECTRON2_DATASETS=datasets $(PY) revdet/train_net.py --config configs/detection/demo/mask_rcnn_rev_vit_demo.py --resume $(ARGS)
	$(PY) revvideo/run.py --config configs/video/demo/motion.yaml --resume

test: setup ## run the tests
	$(PY) -m pytest -q -n 2 --dist loadfile $(ARGS)

lint: setup ## check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: setup ## format the code and apply the safe fixes
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: setup ## run every benchmark that needs no GPU, then write docs/benchmarks.md
	@set -e; for script in $(sort $(wildcard benchmarks/bench_*.py)); do \
		echo "==> $$script"; $(PY) -m "benchmarks.$$(basename "$$script" .py)" $(ARGS); \
	done
	$(PY) -m benchmarks.report

docs: setup ## build the pages of docs/ into site/
	$(PY) -m pip install -q -e '.[docs]' -c constraints.txt
	$(PY) -m mkdocs build --strict

clean: ## remove what runs wrote (output/, outputs/, lightning_logs/), builds and caches; keeps .venv and datasets
	rm -rf site output outputs lightning_logs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find $(wildcard backbones revdet revvideo demo configs tests benchmarks) -type d -name __pycache__ -prune -exec rm -rf {} +
