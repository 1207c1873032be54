"""Accuracy for its size: masks beside full fine-tuning, LoRA and a frozen probe on real tasks."""
