"""Distillation of long-convolution models: their filters become recurrences of constant cost."""
