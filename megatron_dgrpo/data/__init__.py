"""Rows of files, tokens of text: what goes into prompts and supervised examples. Imports no torch."""
