"""Measurements of the whole and of its parts: each script prints a table and keeps its figures.

The figures go to `benchmarks/results/`, one CSV file per script, named as the script is.
"""
