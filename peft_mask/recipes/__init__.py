"""Recipes: a file of rows -> a task, ready for a model -> a trained mask. They need the extra `train`."""
