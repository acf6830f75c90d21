#!/bin/sh
# Everything that a GPU can show, in one go: tests, then every benchmark, each in a file of RESULTS.
# Usage, from the repository's root: tools/benchmarks/gpu.sh RESULTS
# A step that fails is told at the end and does not stop the others.
set -u
results=${1:?usage: tools/benchmarks/gpu.sh RESULTS}
python=${PYTHON:-python}
mkdir -p "$results"
failed=""

run() {
    name=$1
    shift
    echo "== $name: $*"
    "$@" > "$results/$name.log" 2>&1 || failed="$failed $name"
    tail -n 15 "$results/$name.log"
}

nvidia-smi > "$results/device.log"
"$python" -m megaswitch doctor --json > "$results/doctor.json" || failed="$failed doctor"
te=""
if "$python" -c "import torch, transformer_engine.pytorch" > /dev/null 2>&1; then
    te="--te"
else
    echo "Transformer Engine is not installed, so nothing of it is measured:"
    echo "  pip install --no-build-isolation 'transformer-engine[pytorch]>=2.20'"
fi
run tests "$python" -m pytest -m gpu tests
# shellcheck disable=SC2086
run switch "$python" tools/benchmarks/switch_gpu.py $te --output "$results/switch.json"
# shellcheck disable=SC2086
run step "$python" tools/benchmarks/step_gpu.py $te --output "$results/step.json"
run megatron "$python" tools/benchmarks/megatron_layer.py --output "$results/megatron.json"
run adafactor "$python" tools/benchmarks/adafactor.py --device cuda --output "$results/adafactor.json"
run profile "$python" -m megaswitch train --profile examples/demo.toml --train.steps=8 \
    --train.device=cuda --train.precision=bf16 --train.run_dir="$results/run"
if [ -n "$failed" ]; then
    echo "failed:$failed; see $results"
    exit 1
fi
