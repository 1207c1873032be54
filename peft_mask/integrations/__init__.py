"""Doors for programs that ask for a plugin: each file is for one of them, and imports it."""
