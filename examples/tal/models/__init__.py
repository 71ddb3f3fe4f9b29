"""Backbones and localizers.

A backbone maps frames [B, 3, T, H, W] to features [B, C, L]; a localizer maps features and a mask
[B, L] of what is real to scores and boundaries, has a loss, and decodes segments.
"""
