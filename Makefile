# Every target prepares .venv by itself: a fresh machine needs Python >= 3.10 (with venv), gcc and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export GRADALIGN_CUDA ?= $(if $(shell command -v nvidia-smi),1,0)
# Leave .venv alone whatever environment is active around it.
unexport PYTHONPATH VIRTUAL_ENV PYTHONHOME

.PHONY: demo test lint bench gpu-check clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   train with and without gradient alignment on real speech, write runs/demo/report.html (15 min)"
	@echo "make test   lint, then run every test"
	@echo "make lint   ruff, mypy and clang-format"
	@echo "make bench  time every op against the published code"
	@echo "make gpu-check  tests, compute-sanitizer and benchmarks on this machine's GPU (10 minutes)"
	@echo "make clean  remove .venv and everything built"

# The stamp's prerequisites are what changes the installation: dependencies and compiled code.
$(VENV)/.ready: pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*.h csrc/cuda/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip wheel -c constraints.txt setuptools
	@echo "Installing PyTorch and the other dependencies into $(VENV) (about 5 GB, some minutes the first time)"
	$(BIN)/python -m pip install --quiet -c constraints.txt torch triton numpy "pybind11>=2.13" ninja
	@echo "Building the extension"
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e ".[train,corpus,test,lint]"
	@touch $@

# Equal class weights and short inputs: the light detector then learns within the minutes a demo has.
demo: $(VENV)/.ready
	$(BIN)/gradalign corpus build corpus
	$(BIN)/gradalign train corpus --out runs/demo --detector light --align none,pcgrad --seeds 0,1,2 --jobs 2 \
		--num-samples 32000 --batch-size 12 --epochs 10 --lr 1e-3 --class-weights 0.5,0.5
	@echo "Open runs/demo/report.html"

test: lint
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.* csrc/cuda/* tests/cuda_on_host/*.cpp tests/cuda_on_host/*.cu tests/cuda_on_host/*.h)

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/run.py

# With the Python that holds a CUDA PyTorch already, not .venv: machines with a GPU are often without a network.
# $$OUT, where it is set, is the folder that the results go to.
gpu-check:
	GRADALIGN_CUDA=1 TORCH_CUDA_ARCH_LIST=$$($(PYTHON) -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())") \
		$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps -e .
	$(PYTHON) benchmarks/gpu_check.py $(if $(OUT),--out $(OUT)) \
		$(if $(PUBLISHED_RAWBOOST),--published-rawboost $(PUBLISHED_RAWBOOST)) \
		$(if $(PUBLISHED_ALIGNERS),--published-aligners $(PUBLISHED_ALIGNERS)) \
		$(if $(PYTORCH_PCGRAD),--pytorch-pcgrad $(PYTORCH_PCGRAD))

clean:
	rm -rf $(VENV) build gradalign/_C*.so gradalign.egg-info .pytest_cache .mypy_cache .ruff_cache
