# `make demo` and `make test` start from a bare clone: Python >= 3.10 and make are all they need.
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= demo
LAUNCH := $(BIN)/accelerate launch --quiet --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process 2
FAST_TESTS := tests/data tests/models tests/test_files.py tests/test_metrics.py tests/test_package.py tests/test_sources.py \
	tests/export/test_golden.py tests/export/test_noise.py tests/export/test_runtime.py tests/export/test_step_table.py
FITTED := heart moons swiss_roll mnist cifar10
SHIPPED := $(FITTED) swiss_roll_2015 mnist_1
MNIST ?= ylecun/mnist
CIFAR10 ?= uoft-cs/cifar10
export HF_HUB_OFFLINE := 1

.PHONY: demo check style types pytest test test-lowest test-pythons lint docs dist pretrained features pictures schedulers clean

# Train a heart, export it, and sample it in a process that never imports torch.
demo: .venv/installed
	@mkdir -p $(DEMO)
	$(LAUNCH) train_scripts/train_points.py --config heart --output_dir $(DEMO)/heart --overwrite_output_dir
	$(BIN)/ddpm-export $(DEMO)/heart $(DEMO)/heart-onnx --fit 8 --dataset heart --overwrite
	$(BIN)/ddpm-sample $(DEMO)/heart-onnx --num_samples 2000 --seed 0 --output $(DEMO)/heart.png --overwrite
	@echo
	@echo "Made here, on this machine:"
	@echo "  $(DEMO)/heart/               the diffusers checkpoint: DDPMMLPPipeline.from_pretrained(\"$(DEMO)/heart\")"
	@echo "  $(DEMO)/heart/process.gif    noise to heart and back, as an animation (loss.png, forward_process.png, samples.png beside it)"
	@echo "  $(DEMO)/heart-onnx/          the bundle: all that a machine without PyTorch needs"
	@echo "  $(DEMO)/heart.png            2,000 points that ONNX Runtime drew from the bundle"

# For those who work on it: everything that takes no training and no other process, in under two minutes.
check: checks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow" $(FAST_TESTS)

# The whole: what CI runs. It ends by naming what was skipped, and what would un-skip it.
test: .venv/installed
	$(MAKE) --jobs 2 style types docs pytest  # types take a minute at first, on one core

pytest: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal $(PYTEST_ARGS)  # two processes of one thread, for two cores

checks: style types

style: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

types: .venv/installed
	$(BIN)/mypy

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

dist: .venv/installed
	rm -rf dist build
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*

# With the lowest versions that setup.cfg allows: all tests but the slow ones, of which those of several processes are run,
# and but the page's and the ports', whose JavaScript is the same.
test-lowest: .venv-lowest/installed
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -q -n 2 -m "not slow" --ignore tests/export/test_page.py \
		--ignore tests/export/test_ports.py --disable-warnings $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -q tests/test_resuming.py -k two_processes --disable-warnings

# The base install from a wheel, on every Python that this machine has: the same samples, byte for byte.
test-pythons: .venv/installed
	$(BIN)/python tests/every_python.py

lint: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

# What [tool.mypy] in pyproject.toml asks: a minute, then seconds, since it keeps what it has read.
# Images come from the hub, unless MNIST and CIFAR10 name folders that load_dataset takes.
pretrained results-% features pictures schedulers: HF_HUB_OFFLINE := 0

# The command that trains a preset, and the options that name its data to the commands that measure.
images = $(if $(filter cifar10%,$1),$(CIFAR10),$(MNIST))
train = $(LAUNCH) train_scripts/$(if $(filter mnist% cifar10%,$1),train_images.py --dataset_name $(images),train_points.py) \
	--config $1 --output_dir runs/$1 --overwrite_output_dir
points = $(or $(filter heart,$1),$(if $(filter moons,$1),two_moons),swiss_roll)
data = --dataset $(if $(filter mnist% cifar10%,$1),$(images),$(points))
data += $(if $(filter swiss_roll_2015,$1),--dataset_noise 0.001) $(if $(filter mnist_32,$1),--fit pad)

.PRECIOUS: runs/%/model_index.json
runs/%/model_index.json: | .venv/installed
	$(call train,$*)

calls = --num_calls $(if $(filter mnist,$1),4 6 8 3,$(if $(filter cifar10,$1),8 --guidance_scale 3.5 --mixed_precision bf16,8 4))

# Samplers of few calls: tables fitted to the networks, and a network tuned to one call.
$(FITTED:%=runs/%_fitted/model_index.json): runs/%_fitted/model_index.json: runs/%/model_index.json
	$(BIN)/ddpm-fit runs/$* runs/$*_fitted $(call data,$*) $(call calls,$*) --overwrite

runs/mnist_1/model_index.json: runs/mnist/model_index.json
	$(LAUNCH) train_scripts/tune.py --checkpoint runs/mnist $(call data,mnist) --num_calls 1 --output_dir runs/mnist_1 \
		--overwrite_output_dir

define HALVE
import sys
from safetensors.torch import load_file, save_file
weights = {name: value.half() if value.is_floating_point() else value for name, value in load_file(sys.argv[1]).items()}
save_file(weights, sys.argv[1], {"format": "pt"})
endef
export HALVE

# Train the checkpoints that the package ships. Their code stays two lines that import the package's own. The second
# network of digits and the one of colour are stored in float16, to keep the wheel small.
pretrained: $(FITTED:%=runs/%_fitted/model_index.json) runs/swiss_roll_2015/model_index.json runs/mnist_1/model_index.json
	for name in $(SHIPPED); do \
		from=$${name}_fitted; [ -d runs/$$from ] || from=$$name; \
		for file in model_index.json scheduler/scheduler_config.json unet/config.json \
				unet/diffusion_pytorch_model.safetensors; do \
			install -D -m 644 runs/$$from/$$file ddpm_mlp_pipeline/checkpoints/$$name/$$file || exit 1; \
		done; \
		sed -i '/"_name_or_path"/d' ddpm_mlp_pipeline/checkpoints/$$name/unet/config.json; \
	done
	for name in mnist_1 cifar10; do \
		$(BIN)/python -c "$$HALVE" ddpm_mlp_pipeline/checkpoints/$$name/unet/diffusion_pytorch_model.safetensors || exit 1; \
	done

# One row of docs/results.md: train the preset, unless runs/ holds it, and measure what came out.
results-%: runs/%/model_index.json
	$(BIN)/ddpm-export runs/$* runs/$*-onnx --overwrite
	$(BIN)/ddpm-evaluate runs/$*-onnx $(call data,$*) --output runs/$*-distances.json --overwrite
	$(BIN)/ddpm-bound runs/$* $(call data,$*) --variance_type $(if $(filter %2015,$*),learned_range,fixed_large) \
		$(if $(filter %2015,$*),,--timestep_stride 10) $(if $(filter mnist% cifar10%,$*),--num_samples 1000) \
		--output runs/$*-bound.json --figure runs/$*-bound.png --overwrite

# Train the networks on whose features the package takes Fréchet distances: 45 minutes for colour on two cores.
features: .venv/installed
	$(BIN)/python train_scripts/train_features.py --dataset_name $(MNIST) --output_dir runs/mnist_features \
		--overwrite_output_dir
	$(BIN)/python train_scripts/train_features.py --dataset_name $(CIFAR10) --output_dir runs/cifar10_features \
		--block_out_channels 32,96,192 --layers_per_block 2 --num_epochs 40 --max_shift 4 --random_flip \
		--label_smoothing 0.1 --mixed_precision bf16 --overwrite_output_dir
	$(BIN)/python -c "$$HALVE" runs/cifar10_features/diffusion_pytorch_model.safetensors
	for name in mnist_features cifar10_features; do \
		install -m 644 -D -t ddpm_mlp_pipeline/checkpoints/$$name runs/$$name/* || exit 1; \
	done

# The pictures that the README and the pages show.
pictures: runs/heart/model_index.json runs/swiss_roll_angle/model_index.json | .venv/installed
	$(BIN)/ddpm-export ddpm_mlp_pipeline/checkpoints/heart runs/heart-onnx --overwrite
	$(BIN)/ddpm-sample runs/heart-onnx --num_samples 2000 --seed 0 --output docs/images/heart.png --overwrite
	cp runs/heart/process.gif docs/images/heart.gif
	$(BIN)/ddpm-export ddpm_mlp_pipeline/checkpoints/mnist runs/mnist-onnx --overwrite
	$(BIN)/ddpm-sample runs/mnist-onnx --num_samples 64 --seed 0 --output docs/images/mnist.png --overwrite
	$(BIN)/ddpm-export ddpm_mlp_pipeline/checkpoints/mnist_1 runs/mnist-1-onnx --overwrite
	$(BIN)/ddpm-sample runs/mnist-1-onnx --num_samples 64 --seed 0 --output docs/images/mnist_1.png --overwrite
	$(BIN)/ddpm-plot drift ddpm_mlp_pipeline/checkpoints/swiss_roll_2015 --dataset swiss_roll --dataset_noise 0.001 \
		--output docs/images/swiss_roll_2015.png --overwrite
	$(BIN)/ddpm-plot reverse ddpm_mlp_pipeline/checkpoints/mnist --output docs/images/mnist_reverse.png --overwrite
	$(BIN)/ddpm-plot samples runs/swiss_roll_angle --dataset swiss_roll --output docs/images/swiss_roll_angle.png --overwrite
	$(BIN)/ddpm-export ddpm_mlp_pipeline/checkpoints/mnist runs/mnist-20-onnx --scheduler dpmsolver_multistep \
		--num_inference_steps 20 --scheduler_options algorithm_type=sde-dpmsolver++ --overwrite
	$(BIN)/ddpm-sample runs/mnist-20-onnx --class_labels 0 1 2 3 4 5 6 7 8 9 --num_samples 10 \
		--output docs/images/mnist_classes.png --overwrite
	for w in 0 1 2 4; do \
		$(BIN)/ddpm-sample runs/mnist-20-onnx --class_labels 2 3 4 5 8 --num_samples 5 --guidance_scale $$w --seed 1 \
			--output docs/images/mnist_guidance_$$w.png --overwrite || exit 1; \
	done
	$(BIN)/ddpm-export cifar10 runs/cifar10-onnx --overwrite
	$(BIN)/ddpm-sample runs/cifar10-onnx --class_labels 0 1 2 3 4 5 6 7 8 9 --num_samples 10 \
		--output docs/images/cifar10.png --overwrite
	$(BIN)/ddpm-plot reverse cifar10 --output docs/images/cifar10_reverse.png --overwrite
	$(BIN)/ddpm-plot forward cifar10 --dataset $(CIFAR10) --output docs/images/cifar10_forward.png --overwrite
	$(BIN)/ddpm-plot animation cifar10 --output docs/images/cifar10.gif --overwrite
	$(BIN)/ddpm-export cifar10 runs/cifar10-20-onnx --scheduler dpmsolver_multistep --num_inference_steps 20 \
		--scheduler_options algorithm_type=sde-dpmsolver++ --overwrite
	for w in 0 1 2 4; do \
		$(BIN)/ddpm-sample runs/cifar10-20-onnx --class_labels 0 1 2 3 4 5 6 7 8 9 --num_samples 10 --guidance_scale $$w \
			--output docs/images/cifar10_guidance_$$w.png --overwrite || exit 1; \
	done
	$(BIN)/ddpm-export ddpm_mlp_pipeline/checkpoints/mnist runs/mnist-ddpm-onnx --scheduler ddpm \
		--num_inference_steps 100 --overwrite
	$(BIN)/ddpm-sample runs/mnist-20-onnx --class_labels 3 --num_samples 1 --seed 2 --output runs/three.png --overwrite
	$(BIN)/python -c "from PIL import Image; three = Image.open('runs/three.png'); mask = Image.new('L', three.size); \
		mask.paste(255, (0, 0, 28, 14)); mask.save('runs/mask.png'); \
		three.paste(128, (0, 14, 28, 28)); three.save('docs/images/mnist_half.png')"
	$(BIN)/ddpm-sample runs/mnist-ddpm-onnx --known runs/three.png --mask runs/mask.png --resample 10 --num_samples 12 \
		--output docs/images/mnist_completed.png --overwrite
	PAGE_PICTURE=docs/images/page.png $(BIN)/python -m pytest -q tests/export/test_page.py -k picture
	BACKENDS_TABLE=docs/backends.txt $(BIN)/python -m pytest -q tests/export/test_page.py -k backend
	SCHEDULERS_TABLE=docs/schedulers.txt $(BIN)/python -m pytest -q tests/export/test_compile.py

# How good each sampler is on MNIST's weights, and how fast: half an hour on two cores, resumed where it was.
schedulers: .venv/installed
	$(BIN)/ddpm-compare ddpm_mlp_pipeline/checkpoints/mnist --dataset $(MNIST) --output runs/schedulers.json \
		--figure docs/images/schedulers.png --overwrite

.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev]'  # Python compiles what it imports
	@touch $@

.venv-lowest/installed: setup.cfg pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --upgrade pip
	.venv-lowest/bin/python -m pip install --quiet -c constraints-lowest.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv .venv-lowest $(DEMO) build dist site *.egg-info
