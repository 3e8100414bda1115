"""Inside vLLM 0.32 and 0.33, servers and `LLM`: no process loads an uncorrected adapter."""

from csulora.integrations.vllm.installation import install

__all__ = ["install"]
