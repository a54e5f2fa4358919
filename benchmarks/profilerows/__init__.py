"""
The rows of the table of the issue `profile`: row N is in rowN.py, measure(session) gives its figures.

How a start is measured, and what the letters mean, is in benchmarks/README.md.
"""
