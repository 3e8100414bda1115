"""Inside vLLM 0.32 and 0.33: in every process of a server, and in `LLM`, no uncorrected adapter is loaded."""

from csulora.integrations.vllm.installation import install

__all__ = ["install"]
