"""The rows of the table of the issue `peers`: row N is in rowN.py, measure(session) gives its figures."""
