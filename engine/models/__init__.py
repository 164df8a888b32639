from engine.models.build import build_model
from engine.models.causal_lm import CausalLM

__all__ = ["CausalLM", "build_model"]
