"""
The configuration: /etc/lazyfs/config.toml and LAZYFS_<SECTION>_<KEY>. Keys: config.table. Light to import.

    config = load()                # LAZYFS_CONFIG, or /etc/lazyfs/config.toml, or defaults; then the environment
    config.daemon.cache_dir

Layer: beside errors and limits, on top of them. Raises ConfigError and nothing else.
"""

from lazyfs.config.key import Key
from lazyfs.config.kinds import Amount, split_address
from lazyfs.config.loading import Problem, check, from_plain, load, to_plain
from lazyfs.config.peerstable import Peers
from lazyfs.config.table import (
    DEFAULT_FILE,
    Cache,
    Config,
    Daemon,
    Log,
    Profile,
    Registry,
    RegistryHost,
    Snapshotter,
    Verify,
    VerifyRule,
    all_keys,
)
from lazyfs.config.trackertable import Tracker

__all__ = ["DEFAULT_FILE", "Amount", "Cache", "Config", "Daemon", "Key", "Log", "Peers", "Problem", "Profile",
           "Registry", "RegistryHost", "Snapshotter", "Tracker", "Verify", "VerifyRule", "all_keys", "check",
           "from_plain", "load", "split_address", "to_plain"]
