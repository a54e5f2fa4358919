"""One file a row of the table of targets. Each has `TITLE` and `measure(session)`, and can be run alone."""
