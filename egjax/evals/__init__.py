"""Evaluation and report: intervals, text metrics, plans in the simulator, probes, one HTML page.

Import the module that you need: plots, page and ROUGE bring libraries of the extra `eval`, the
others do not.
"""
