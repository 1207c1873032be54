"""Masks around a module: a layer for each kind of module that can be masked."""
