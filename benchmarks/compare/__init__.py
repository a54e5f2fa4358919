"""
lazyfs beside what a user would pick instead: same machine, same run, same link.

`cases` says which programs and when they are ready, `peer` what a system must do; `whole`, `ours`, `nydus` and `stargz`
are the systems; `report` and `picture` show what was measured. Method and options: benchmarks/README.md.
"""
