# Every target sets itself up: it makes .venv when it is missing or older than what it is made from.
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_BENCH := $(VENV)/.ready-bench
JAX := .venv-jax
READY_JAX := $(JAX)/.ready
TRAINERS := .venv-trainers
READY_TRAINERS := $(TRAINERS)/.ready
FLOOR := .venv-floor
READY_FLOOR := $(FLOOR)/.ready
NEWEST := .venv-newest
READY_NEWEST := $(NEWEST)/.ready
OLDEST_TORCH := $(shell sed -n 's/^dependencies = \["torch>=\([0-9.]*\)"\].*/\1/p' pyproject.toml)
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal
INSTALL := $(PIP) install --quiet --constraint constraints.txt --build-constraint constraints.txt

.PHONY: help demo test lint check slow faults trainers floor newest bench contract mgh curvature cartpole training learning clean

help:
	@echo "make demo      train TRPO on CartPole-v1 and draw its learning curve"
	@echo "make test      the fast tests"
	@echo "make lint      format, lint and types"
	@echo "make check     make lint and make test"
	@echo "make slow      the tests that learn to a target, and the laws on many more examples"
	@echo "make faults    interrupts, kills, damaged files and dying processes, thousands of each; long"
	@echo "make trainers  the examples under Lightning and accelerate, on the real packages"
	@echo "make floor     the fast tests on the oldest torch that pyproject.toml promises"
	@echo "make newest    the fast tests on the newest torch that pip finds"
	@echo "make bench     timings against peers, in one run"
	@echo "make contract  the table of docs/contract.md, other optimizers beside ours"
	@echo "make mgh       the table of docs/newton_benchmarks.md"
	@echo "make curvature the tables of docs/curvature_benchmarks.md, JAX among the peers"
	@echo "make cartpole  the ten-seed CartPole table of docs/cartpole.md"
	@echo "make training  the timings of docs/rl_benchmarks.md"
	@echo "make learning  what is learnt there, against sb3-contrib; hours"
	@echo "make clean     remove what the targets made"

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (once; a few minutes where torch has to be downloaded)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet --constraint constraints.txt --upgrade pip
	@$(INSTALL) --editable ".[rl]" --group test --group lint
	@touch $@

$(READY_BENCH): $(READY)
	@$(INSTALL) --group bench
	@$(INSTALL) --no-deps backpack-for-pytorch curvlinops-for-pytorch
	@touch $@

$(READY_JAX): pyproject.toml constraints.txt
	@$(PYTHON) -m venv $(JAX)
	@$(JAX)/bin/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	@$(JAX)/bin/python -m pip install --quiet --constraint constraints.txt --group jax
	@touch $@

$(READY_TRAINERS): pyproject.toml constraints.txt
	@$(PYTHON) -m venv $(TRAINERS)
	@$(TRAINERS)/bin/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	@$(TRAINERS)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[rl]" --group trainers
	@touch $@

# The constraints of everything else, with another torch. One process and one thread, as in CI.
$(READY_FLOOR): pyproject.toml constraints.txt
	@$(PYTHON) -m venv $(FLOOR)
	@sed 's/^torch==.*/torch==$(OLDEST_TORCH).*/' constraints.txt > $(FLOOR)/constraints.txt
	@$(FLOOR)/bin/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	@$(FLOOR)/bin/python -m pip install --quiet --constraint $(FLOOR)/constraints.txt --editable ".[rl]" --group test
	@touch $@

$(READY_NEWEST): pyproject.toml constraints.txt
	@$(PYTHON) -m venv $(NEWEST)
	@sed '/^torch==/d' constraints.txt > $(NEWEST)/constraints.txt
	@$(NEWEST)/bin/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	@$(NEWEST)/bin/python -m pip install --quiet --constraint $(NEWEST)/constraints.txt --editable ".[rl]" --group test
	@touch $@

demo: $(READY)
	@$(BIN)/python -m rl train CartPole-v1 --total-timesteps 27000

test: $(READY)
	@$(PYTEST) -m "not slow and not faults"

lint: $(READY)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright

check: lint test

slow: $(READY)
	@HYPOTHESIS_PROFILE=thorough $(PYTEST) -m "(slow or hypothesis) and not faults"

faults: $(READY)
	@HYPOTHESIS_PROFILE=thorough $(PYTEST) -m faults

trainers: $(READY_TRAINERS)
	@$(TRAINERS)/bin/python -m pytest -q tests/trustregion/optim/test_trainers.py

floor: $(READY_FLOOR)
	@$(FLOOR)/bin/python -c "import torch; print('torch', torch.__version__)"
	@OMP_NUM_THREADS=1 $(FLOOR)/bin/python -m pytest -q -m "not slow and not faults"

newest: $(READY_NEWEST)
	@$(NEWEST)/bin/python -m pip install --quiet --constraint $(NEWEST)/constraints.txt --upgrade torch
	@$(NEWEST)/bin/python -c "import torch; print('torch', torch.__version__)"
	@OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -q -m "not slow and not faults"

bench: $(READY_BENCH)
	@$(BIN)/python -m pytest benchmarks -q --benchmark-only --benchmark-sort=name
	@$(BIN)/python -m benchmarks.solvers
	@$(BIN)/python -m benchmarks.regions
	@$(BIN)/python -m benchmarks.pairs
	@$(BIN)/python -m benchmarks.rosenbrock

contract: $(READY_BENCH)
	@$(BIN)/python -m benchmarks.contract

mgh: $(READY_BENCH)
	@$(BIN)/python -m benchmarks.mgh

curvature: $(READY_BENCH) $(READY_JAX)
	@$(INSTALL) --editable ".[mujoco]"
	@$(BIN)/python -m benchmarks.curvature
	@$(BIN)/python -m benchmarks.curvature_memory
	@$(BIN)/python -m benchmarks.curvature_cost
	@$(BIN)/python -m benchmarks.quality_time

cartpole: $(READY)
	@$(BIN)/python benchmarks/cartpole.py

training: $(READY_BENCH)
	@$(INSTALL) --editable ".[mujoco,envpool]"
	@$(BIN)/python -m benchmarks.rl_update
	@$(BIN)/python -m benchmarks.rl_speed
	@$(BIN)/python -m benchmarks.rl_scaling
	@$(BIN)/python -m benchmarks.critics

learning: $(READY_BENCH)
	@$(INSTALL) --editable ".[mujoco]" "gymnasium[box2d]"
	@$(BIN)/python -m benchmarks.rl_learning run
	@$(BIN)/python -m benchmarks.rl_learning run --seeds 3 --envs InvertedDoublePendulum-v5 Hopper-v5
	@$(BIN)/python -m benchmarks.rl_learning run --envs HalfCheetah-v5
	@$(BIN)/python -m benchmarks.rl_learning run --sides ours --algorithm ppo --envs CartPole-v1 LunarLander-v3
	@$(BIN)/python -m benchmarks.rl_learning run --sides ours --algorithm npg --envs CartPole-v1 Pendulum-v1
	@$(BIN)/python -m benchmarks.rl_learning run --sides ours --algorithm kl_penalty --envs CartPole-v1 Pendulum-v1
	@$(BIN)/python -m benchmarks.rl_learning table

clean:
	rm -rf $(VENV) $(JAX) $(TRAINERS) $(FLOOR) $(NEWEST) .pytest_cache .ruff_cache .hypothesis .benchmarks build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
