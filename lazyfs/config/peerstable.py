"""
[peers]: how this node shares chunks with others of its cluster.

Layer: config. Who calls: config.table.
"""

from __future__ import annotations

from dataclasses import dataclass

from lazyfs.config.key import key
from lazyfs.config.kinds import AbsolutePath, Address, Choice, List, Name, Number, Place, Size, Url

MEMBER_COUNT_MAX = 1000          # of `static`: the configuration travels as one argument (config.loading)
TRACKER_COUNT_MAX = 8


@dataclass(frozen=True)
class Peers:
    """[peers]"""

    cluster: str = key(Name(optional=True), "",
                       "The name of the cluster, the same on all of its nodes. With it, and one of `tracker`, `static` "
                       "and `dns`, this node fetches chunks from the others, and gives them its own (docs/peers.md); "
                       "empty: it does not.")
    tracker: tuple[str, ...] = key(List(Url(required=True), "URLs", TRACKER_COUNT_MAX), (),
                                   "Trackers of the cluster, all of them equal: the next one is asked when one fails.")
    static: tuple[str, ...] = key(List(Place(), "host:port", MEMBER_COUNT_MAX), (),
                                  "The peer servers of all nodes, where there is no tracker; this node's own may be "
                                  "among them.")
    dns: str = key(Place(optional=True), "",
                   "name:port; the addresses of this name are the nodes of the cluster (a headless service).")
    address: str = key(Address(), "0.0.0.0:9451",
                       "Where this node's peer server listens. A port alone means loopback, where no other node "
                       "reaches it.")
    advertise: str = key(Place(optional=True), "",
                         "host:port by which the others reach it; empty: the address that this node's traffic leaves "
                         "with, and the port of `address`.")
    node: str = key(Name(optional=True), "",
                    "This node's name in the cluster, unique and lasting; empty: its host name.")
    zone: str = key(Name(optional=True), "",
                    "Where this node is. Members of a zone fetch from each other, and few cross to another one.")
    network: str = key(Name(optional=True), "",
                       "The network in which this node is reached, where not every node of the cluster reaches every "
                       "other one: the tracker tells it only of nodes that name the same. Needs `tracker`.")
    upload_rate: int = key(Size(), 0, "No more than this a second is sent to others; 0: no bound.", unit="bytes/s")
    upload_concurrent: int = key(Number(1, 1024, whole=True), 64,
                                 "Requests of others answered at the same time; who comes too many is sent elsewhere.")
    download_rate: int = key(Size(), 0, "No more than this a second is fetched from others; 0: no bound.",
                             unit="bytes/s")
    tracker_token_file: str = key(AbsolutePath(optional=True), "",
                                  "A file with the word on its first line that `tracker` wants to be shown "
                                  "(`tracker.token_file`), readable for root only.")
    cert_file: str = key(AbsolutePath(optional=True), "",
                         "This node's certificate (PEM): peers then speak TLS, and only with who has one of `ca_file` "
                         "too. Read again when it changes.")
    key_file: str = key(AbsolutePath(optional=True), "", "Its key (PEM), readable for root only.")
    ca_file: str = key(AbsolutePath(optional=True), "", "The authority of the nodes' certificates (PEM).")
    tokens: str = key(Choice(("off", "cluster", "resource")), "off",
                      "What others must show to get data of this node: nothing; a token of the cluster; or one for "
                      "that very image, which only who may pull it gets (docs/tokens.md). Needs `tracker`; the same as "
                      "`tracker.tokens` there.")
    token_grace_s: float = key(Number(0, 7 * 86_400.0), 3600.0,
                               "While no tracker is heard of, tokens count for so much longer.", unit="s")

    @property
    def enabled(self) -> bool:
        """Whether this node has peers."""
        return bool(self.cluster and (self.tracker or self.static or self.dns))

    def problems(self) -> list[tuple[str, str]]:
        """What no key can see alone: texts and hints."""
        found = []
        ways = (self.tracker, self.static, self.dns)
        if self.cluster and not any(ways):
            found.append(("peers.cluster: expected peers.tracker, peers.static or peers.dns beside it, found none",
                          "one of them says who the others are"))
        if any(ways) and not self.cluster:
            found.append(("peers: expected peers.cluster beside tracker, static or dns, found none",
                          "all nodes of a cluster name it alike"))
        files = {"cert_file": self.cert_file, "key_file": self.key_file, "ca_file": self.ca_file}
        missing = [name for name, value in files.items() if not value]
        if 0 < len(missing) < len(files):
            text = f"peers: expected cert_file, key_file and ca_file together, found no {' and no '.join(missing)}"
            found.append((text, "nodes show each other certificates of one authority"))
        if self.tokens != "off" and not self.tracker:
            found.append((f'peers.tokens = "{self.tokens}": expected peers.tracker beside it, found none',
                          "a tracker gives the tokens"))
        if self.network and not self.tracker:
            found.append((f'peers.network = "{self.network}": expected peers.tracker beside it, found none',
                          "peers.static or peers.dns of each network names its own nodes"))
        return found
