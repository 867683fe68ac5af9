"""Frozen models that score the student's tokens: their forward, their rows, their heads on the student's boundaries."""
