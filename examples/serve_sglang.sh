#!/usr/bin/env bash
# SGLang behind csulora's guard, from the check of its adapters to the probe. Needs a GPU and sglang in the same
# environment. No test runs this script as a whole: docs/serving.md says what of it was tested.
#   serve_sglang.sh MODEL CSULORA_TOML [PORT]
set -euo pipefail
model=$1 config=$2 port=${3:-30000} rank=32

csulora serve-check --config "$config" --stack sglang --max-lora-rank "$rank"
csulora prewarm --config "$config" --max-lora-rank "$rank"

CSULORA_CONFIG=$config python -m sglang.launch_server --model-path "$model" --port "$port" \
    --enable-lora --max-lora-rank "$rank" --lora-target-modules all &
server=$!
trap 'kill "$server"' EXIT

until curl -sf "http://localhost:$port/health"; do
    kill -0 "$server"
    sleep 2
done
csulora serve-check --url "http://localhost:$port" --stack sglang
wait "$server"
