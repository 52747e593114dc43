# What a change needs, by name. Each target makes the environment that it uses.
#
#   make test ARGS=tests/unit      what `bash tests/run.sh tests/unit` runs
#   make lock                      requirements/*.txt anew: the newest releases that pyproject.toml allows

PYTHON ?= python3
VENV ?= .venv-test
UV ?= uv==0.13.9
# The release that the project is developed on. Every other package is locked at its newest allowed release.
TORCH ?= torch==2.13.0

.PHONY: test lint shape lock wheel docs

test:
	PYTHON=$(PYTHON) VENV=$(VENV) bash tests/run.sh $(ARGS)

lint:
	bash requirements/install.sh requirements/test.txt $(VENV)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy benchmarks .ci/shape.py docs/*.py requirements/torchvision_ops.py

shape:
	bash requirements/install.sh requirements/test.txt $(VENV)
	$(VENV)/bin/python .ci/shape.py

lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet --disable-pip-version-check $(UV)
	UV=.venv-lock/bin/uv bash requirements/lock.sh $(TORCH)

wheel:
	PYTHON=$(PYTHON) bash requirements/install.sh requirements/build.txt .venv-build
	.venv-build/bin/python -m build --no-isolation

docs:
	bash requirements/install.sh requirements/test.txt $(VENV)
	$(VENV)/bin/python docs/tables.py
	$(VENV)/bin/python docs/config_schema.py
	$(VENV)/bin/python docs/errors.py
	$(VENV)/bin/python docs/api.py
	$(VENV)/bin/python docs/cli.py
	PYTHON=$(PYTHON) VENV=$(VENV) bash tests/run.sh tests/docs
