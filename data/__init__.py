"""Read captions and photos: every supported format becomes one table of image-caption pairs, split by image.

This package finds, decodes, preprocesses and caches photos, and tokenizes captions. It does not depend on any model.
"""
