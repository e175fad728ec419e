"""Runs of ``sample`` side by side, each of them measured: a sweep of guidance, and a paper's table."""
