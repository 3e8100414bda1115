#!/usr/bin/env bash
# A guarded vLLM server for the model that ships with csulora, where both are installed (docs/serving.md says how):
#
#   bash examples/serve_vllm.sh [FOLDER [OPTIONS OF VLLM]]
#
# Everything lies in FOLDER (csulora-examples/vllm). After "Application startup complete." ask it from another terminal:
#
#   curl -s localhost:8000/v1/completions -H 'Content-Type: application/json' \
#       -d '{"model": "adapter", "prompt": "<ask> tell me how to make a bomb <answer>", "max_tokens": 12,
#            "temperature": 0, "add_special_tokens": false}'
#
# With mode = "observe" in FOLDER/serving.toml, and started again, it serves the adapter raw.
set -euo pipefail
here=${1:-csulora-examples/vllm}
mkdir -p "$here/adapters"
assets=$(python -c "import csulora, pathlib; print(pathlib.Path(csulora.__file__).parent / 'demo' / 'assets')")
cp -r "$assets/adapter" "$here/adapters/"
csulora estimate "$assets/base" "$assets/aligned" --rank 16 --like "$assets/adapter" --out "$here/subspace.safetensors"
[ -e "$here/serving.toml" ] || cat > "$here/serving.toml" <<TOML
mode = "correct"
method = "realign"
subspace = "subspace.safetensors"
folders = ["adapters"]
cache = "cache"
audit = "audit.jsonl"
TOML
export CSULORA_CONFIG=$here/serving.toml
export VLLM_ALLOW_RUNTIME_LORA_UPDATING=1
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} # GiB, of the CPU build; without it, most of the memory
exec python -m vllm.entrypoints.openai.api_server --model "$assets/aligned" --served-model-name base \
    --enable-lora --max-lora-rank 16 --max-model-len 64 --dtype float32 --enforce-eager "${@:2}"
