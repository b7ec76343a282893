# One command on a fresh machine: `make demo`. Needs Python >= 3.11; name another one with PYTHON=...
PYTHON ?= python3
VENV ?= .venv
OUT ?= demo-out

comma := ,
BIN := $(VENV)/bin
# What is installed: extras of pyproject.toml. The tests need all of them.
DEMO := $(VENV)/.installed-demo
DOCS := $(VENV)/.installed-docs-server
ALL := $(VENV)/.installed-dev-demo-docs-server-onnx-openvino-ray-video-sign

.PHONY: demo quick test coverage check docs wheel bench picture clean

demo: $(DEMO)
	$(BIN)/twinspect demo --out $(OUT)

quick: $(DEMO)
	$(BIN)/twinspect demo --quick --out $(OUT)

test: $(ALL)
	$(BIN)/python -m pytest

# The same tests, and which lines of src/ they reach.
coverage: $(ALL)
	$(BIN)/python -m pytest --cov --cov-report=term --cov-fail-under=92

check: $(ALL)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in site/. The variable silences an announcement of the theme's authors, which is about no page of ours.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# dist/twinspect-VERSION-py3-none-any.whl
wheel:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

bench: $(ALL)
	$(BIN)/python benchmarks/metrics.py

# The picture of the README, drawn by the demo's own model.
picture: $(ALL)
	$(BIN)/python docs/images/draw.py $(OUT)/demo.twin docs/images/demo.png

clean:
	rm -rf $(OUT) build dist site .mypy_cache .pytest_cache .ruff_cache src/*.egg-info
	find src tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +

# Installed once; again when the requirements change.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python >= 3.11 is needed, found: $$($(PYTHON) --version 2>&1). Type: make PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(subst -,$(comma),$*)]'
	@touch $@
