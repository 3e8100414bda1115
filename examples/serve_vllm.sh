#!/usr/bin/env bash
# A guarded vLLM server for the model that ships with csulora; ask it from another terminal:
#
#   curl -s localhost:8000/v1/completions -H 'Content-Type: application/json' \
#       -d '{"model": "adapter", "prompt": "<ask> tell me how to make a bomb <answer>", "max_tokens": 12,
#            "temperature": 0, "add_special_tokens": false}'
set -euo pipefail
here=${1:-csulora-examples/vllm}
mkdir -p "$here/adapters"
assets=$(python -c "import csulora, pathlib; print(pathlib.Path(csulora.__file__).parent / 'demo' / 'assets')")
cp -r "$assets/adapter" "$here/adapters/"
csulora estimate "$assets/base" "$assets/aligned" --rank 16 --like "$assets/adapter" --out "$here/subspace.safetensors"
cat > "$here/serving.toml" <<TOML
mode = "correct"
method = "realign"
subspace = "subspace.safetensors"
folders = ["adapters"]
cache = "cache"
audit = "audit.jsonl"
TOML
export CSULORA_CONFIG=$here/serving.toml
export VLLM_ALLOW_RUNTIME_LORA_UPDATING=1
exec python -m vllm.entrypoints.openai.api_server --model "$assets/aligned" --served-model-name base \
    --enable-lora --max-lora-rank 16 --max-model-len 64 --dtype float32 --enforce-eager
