"""The rows of the table of the issue `node`: row N is in rowN.py, measure(session) gives its figures."""
