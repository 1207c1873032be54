"""Mask <-> bits <-> file, and `Masks`, an adapter as a value. Needs torch, numpy and safetensors, no PEFT."""
