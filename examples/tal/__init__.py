"""Temporal action localization on rewired backbones: frames in, labelled segments out."""
