"""
[mirror]: the pull mirror for ordinary images.

Layer: config. Who calls: config.table.
"""

from __future__ import annotations

from dataclasses import dataclass

from lazyfs import limits
from lazyfs.config.key import key
from lazyfs.config.kinds import AbsolutePath, Address, Choice, Flag, List, Number, Pattern, Place, Size

_DAY_S = 86_400.0
_RULE_COUNT_MAX = 100


@dataclass(frozen=True)
class Mirror:
    """[mirror]"""

    address: str = key(Address(), "",
                       "Where the pull mirror for ordinary images listens (docs/mirror.md); empty: the daemon starts "
                       "none. A port alone means loopback, and so it should: who can connect may pull what this node "
                       "may.")
    dir: str = key(AbsolutePath(), "/var/lib/lazyfs/mirror",
                   "Its own data: manifests, what it proved, pieces of blobs that it fetches.")
    quota_bytes: int = key(Size(), 10 * limits.GIB,
                           "Pieces of blobs above this are evicted, least recently used first.", unit="bytes")
    containerd_root: str = key(AbsolutePath(optional=True), "/var/lib/containerd",
                               "containerd's directory: blobs that are in its content store are served from there, "
                               "without a copy; empty: not looked at.")
    tag_fresh_s: float = key(Number(0, 30 * _DAY_S), 0.0,
                             "So long a tag's digest is believed without asking the registry again.", unit="s")
    proof_s: float = key(Number(1, _DAY_S), 300.0,
                         "So long after the registry let this node have something it is served from here without "
                         "asking again.", unit="s")
    offline_s: float = key(Number(0, 366 * _DAY_S), _DAY_S,
                           "While the registry cannot be reached: so long after it last said so, a tag's digest and "
                           "the right to pull still count; 0: not at all.", unit="s")
    tags_from_peers_s: float = key(Number(0, 366 * _DAY_S), 0.0,
                                   "While the registry cannot be reached: so long after it told them, what other "
                                   "members of the cluster say of a tag and of a manifest counts (docs/mirror.md), and "
                                   "so long this node tells them; 0: not at all.", unit="s")
    tags_from_peers_agree: int = key(Number(1, 8, whole=True), 2,
                                     "So many of them must say the same of a tag.")
    private: str = key(Choice(("node", "never")), "node",
                       "Images that need credentials: served to who may connect, if this node's own credentials may "
                       "pull them; or never: only what anybody may pull.")
    peers_address: str = key(Address(), "0.0.0.0:9452",
                             "Where its own peer server listens, if [peers] is configured; the port is the same on "
                             "all nodes.")
    proxy: tuple[str, ...] = key(List(Pattern(), "regular expressions", _RULE_COUNT_MAX), (),
                                 "As an HTTP proxy (docs/get.md): URLs, without their query, in which one of these is "
                                 "found are kept, and asked about at their server each time; others are passed on.")
    proxy_immutable: tuple[str, ...] = key(List(Pattern(), "regular expressions", _RULE_COUNT_MAX), (),
                                           "The same, of URLs whose bytes never change: not asked about again.")
    proxy_hosts: tuple[str, ...] = key(List(Place(), "host:port", _RULE_COUNT_MAX), (),
                                       "Where the proxy makes tunnels to (CONNECT: for https), and what it may reach "
                                       "on this machine itself.")
    share_unverified: bool = key(Flag(), False,
                                 "Fetch files whose digest nobody knows from peers too: every node of the cluster is "
                                 "trusted to give the right bytes.")
