"""Image and text towers by name, assembled into a CLIPModel; what is frozen, adapted or split; checkpoints.

The nn.Modules themselves are in modules.py.
"""
