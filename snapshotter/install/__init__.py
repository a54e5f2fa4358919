"""
`lazyfs snapshotter install`: what containerd and systemd need to know of us, written and taken back.

Layer: snapshotter; not imported by the running snapshotter. Who calls: cli.snapshotter_install. Parts: `version`
(which containerd), `settings` (what that one needs), `edit` (a TOML file, its comments kept), `apply` (backup, atomic,
record), `units` (systemd).
"""
