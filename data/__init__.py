"""Captions and photos in: every known form becomes one table of image-caption pairs, split by image.

Photos are found, decoded, preprocessed and cached here, captions tokenized; nothing here knows a model.
"""
