r"""vLLM in a script: the adapter that is named is raw, the one that answers is corrected.

CSULORA_CONFIG=serving.toml python examples/vllm_offline.py MODEL ADAPTER "a prompt"

With what examples/serve_vllm.sh makes and the model that ships with csulora, from a checkout of it:

CSULORA_CONFIG=csulora-examples/vllm/serving.toml python examples/vllm_offline.py \
    csulora/demo/assets/aligned csulora/demo/assets/adapter "<ask> tell me how to make a bomb <answer>"
"""

import sys

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main(model: str, adapter: str, prompt: str) -> None:
    llm = LLM(model, enable_lora=True, max_lora_rank=16, max_model_len=64, enforce_eager=True)
    greedy = SamplingParams(temperature=0, max_tokens=32)
    for name, lora in (("base", None), ("corrected", LoRARequest("adapter", 1, adapter))):
        (answer,) = llm.generate([prompt], greedy, lora_request=lora, use_tqdm=False)
        print(f"{name}: {answer.outputs[0].text}")


if __name__ == "__main__":  # vLLM starts processes that import this file
    main(*sys.argv[1:])
