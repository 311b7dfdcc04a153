"""Comparison of models: a plan of runs, the processes that make them, tables and a picture."""
