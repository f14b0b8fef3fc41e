"""Detectors: wave [B, T] at 16 kHz in, logits [B, 2] out."""
