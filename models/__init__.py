"""Towers by name, assembled into a CLIPModel; freezing, adapters and splitting of the trunk; checkpoints.

The nn.Modules themselves are in modules.py.
"""
