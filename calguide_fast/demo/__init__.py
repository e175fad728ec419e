"""Guided sampling end to end on real data: scikit-learn's handwritten digits."""
