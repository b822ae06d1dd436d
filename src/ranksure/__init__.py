"""Certified LoRA ranks in the NTK regime."""
