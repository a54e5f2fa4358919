"""
What starts read of an image: recordings, made into prefetch lists; lists merged, compared, checked and shown.

    recording.py   what a worker recorded: byte ranges of layer devices, in the order of first access
    files.py       an image's files, and which of them lie in a device's range: a recording becomes a Profile
    parts.py       Profile: ranges of files in order. To and from prefetch lists
    merge.py       several runs, one profile        diff.py       two profiles compared
    coverage.py    a list against another image     summary.py    totals, top files, time line
    picture.py     the same as SVG and HTML

Layer: lazyfs.profile, above lazyfs.image, beside lazyfs.fetch; imports errors, limits and image only. No I/O. Who
calls: `lazyfs profile`, benchmarks.
"""
