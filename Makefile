# Two commands for a fresh machine with Python 3.11+, pip and make: `make demo` and `make test`.
PYTHON ?= python3
# The Keras backend of the demo: jax, tensorflow or torch. docs/essay.md says why this one.
DEMO_BACKEND ?= tensorflow

.PHONY: help demo test quick lint docs dist
.DEFAULT_GOAL := help

help: ## list these targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/'

demo: ## see a frozen BN layer break a fine-tuned network, and Frostline fix it
	@$(PYTHON) scripts/prepare_environment.py demo $(DEMO_BACKEND)
	KERAS_BACKEND=$(DEMO_BACKEND) TF_CPP_MIN_LOG_LEVEL=3 .venv/bin/frostline demo

test: ## static checks, then the test suite once per Keras backend; ARGS go to pytest
	@$(PYTHON) scripts/prepare_environment.py test
	@.venv/bin/python scripts/run_tests.py $(ARGS)

quick: ## the loop while you work: ruff, unit and contract tests on one backend, about two minutes
	@$(PYTHON) scripts/prepare_environment.py test
	@.venv/bin/python scripts/run_tests.py --quick $(ARGS)

lint: ## the static checks alone
	@$(PYTHON) scripts/prepare_environment.py test
	@.venv/bin/python scripts/run_tests.py --checks-only

docs: ## the site in build/site: no network, no warning, links checked
	@$(PYTHON) scripts/prepare_environment.py docs
	@KERAS_BACKEND=torch NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
	@.venv/bin/python scripts/check_site.py build/site

dist: ## wheel and sdist in dist/, checked; uploads nothing
	@$(PYTHON) scripts/prepare_environment.py docs
	@.venv/bin/python scripts/make_dist.py
