"""Masks in a model: which modules, what is saved and loaded, merging, switching, mixing."""
