"""Continual learning for large vision-language models with LoRA experts (LLaVA-DyMoE and its baselines)."""

__version__ = "0.1.0"
