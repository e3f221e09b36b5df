# The two commands of the README, and what a contributor runs before a commit.
PYTHON ?= python3.11
VENV   ?= .venv
JOBS   ?= 2
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed

.PHONY: demo test test-thorough test-cluster cluster-packages check lint types wheel clean

demo: $(STAMP)
	$(BIN)/reelscale demo demo

test: $(STAMP)
	$(BIN)/python -P -m pytest --ignore=tests/cluster -m "not thorough" --numprocesses=$(JOBS) --dist=worksteal

# The same claims at further sizes: what `make test` leaves out to stay under ten minutes.
test-thorough: $(STAMP)
	$(BIN)/python -P -m pytest --ignore=tests/cluster -m thorough --numprocesses=$(JOBS) --dist=worksteal

# Real SLURM, network namespaces and three MPIs; needs root, installs no service and leaves nothing running.
test-cluster: $(STAMP)
	$(BIN)/python -P -m pytest tests/cluster

cluster-packages:
	apt-get update -q
	apt-get install -q -y --no-install-recommends slurmctld slurmd slurm-client slurm-wlm-basic-plugins iproute2 libpmix-dev ffmpeg

check: lint types test test-thorough wheel

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

# The wheel, installed nowhere else than in a folder of its own, must run from an empty folder.
wheel: $(STAMP)
	rm -rf build/wheel && mkdir -p build/wheel/empty
	$(BIN)/python -m build --wheel --no-isolation --outdir build/wheel . >build/wheel/log 2>&1 || (cat build/wheel/log; false)
	$(BIN)/pip install -q --no-deps --target build/wheel/site build/wheel/*.whl
	cd build/wheel/empty && PYTHONPATH=../site ../../../$(BIN)/python -P ../site/bin/reelscale experiments

# One environment for all of it: pinned by constraints.txt, made again when what it is made from changes.
$(STAMP): setup.cfg constraints.txt
	@echo "making $(VENV) and installing the pinned packages: one to two minutes, more on a slow line"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,mpi,deepspeed,http,s3,torchcodec]' setuptools
	touch $(STAMP)

clean:
	rm -rf $(VENV) build demo runs
