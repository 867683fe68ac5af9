"""Trajectories to micro-batches: what travels with a micro-batch is listed explicitly in a layout record."""
