"""Sampling at a paper's scale: many images, many machines, stopped and resumed at will."""
