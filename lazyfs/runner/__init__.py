"""
Run a lazy image once or several times, and learn what its start reads: the work of `lazyfs profile run`.

    session.py      all of it: record_runs()       container.py   overlayfs and runc, watched
    workspace.py    what is on the machine, and its removal       recording.py   what the worker knows
    imageconfig.py  what the image says about its process         users.py       names to numbers
    spec.py         the OCI runtime bundle          rootfs.py      reading inside a hostile tree
    rules.py        when a run is over              output.py, probe.py   what the rules look at

Layer: lazyfs.runner, above lazyfs.node and lazyfs.profile. Who calls: cli.profile_run, cli.convert_profiled.
"""
