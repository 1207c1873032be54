"""Scores -> mask -> masked weight: functions on tensors, from where scores start to their gradients."""
