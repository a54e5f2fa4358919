"""
[tracker]: the service that tells the nodes of clusters of each other.

Layer: config. Who calls: config.table.
"""

from __future__ import annotations

from dataclasses import dataclass

from lazyfs.config.key import key
from lazyfs.config.kinds import AbsolutePath, Address, Choice, List, Name, Number, Shaped

CLUSTER_COUNT_MAX = 256          # of `preheat_clusters`
REGISTRY_COUNT_MAX = 256         # of `registries`
# No user name, password or option in it: those would be in everybody's process list.
_REDIS = Shaped(r"(rediss?://[A-Za-z0-9\[][^/?#@\s]*(/[0-9]{1,4})?|unix:///[^?#@\s]+)",
                '"redis://host[:port][/number]", "rediss://...", "unix:///path"', optional=True)
# As image references name it; a URL would never match one.
_REGISTRY = Shaped(r"([A-Za-z0-9][A-Za-z0-9.-]{0,252}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?", "a host, or host:port")


@dataclass(frozen=True)
class Tracker:
    """[tracker]"""

    address: str = key(Address(), "127.0.0.1:9450",
                       "Where `lazyfs tracker` listens (docs/tracker.md). A port alone means loopback.")
    redis: str = key(_REDIS, "",
                     "Where its state is, so that several trackers serve the same clusters, and a restart forgets "
                     "nothing; empty: in its memory.")
    redis_password_file: str = key(AbsolutePath(optional=True), "",
                                   "A file with Redis' password on its first line, readable for root only.")
    token_file: str = key(AbsolutePath(optional=True), "",
                          "A file with the word (16 characters or more) on its first line that nodes must show "
                          "(`peers.tracker_token_file`); empty: who reaches the tracker may join.")
    cert_file: str = key(AbsolutePath(optional=True), "",
                         "Its certificate (PEM): it then speaks HTTPS. Read again when it changes.")
    key_file: str = key(AbsolutePath(optional=True), "", "Its key (PEM).")
    ca_file: str = key(AbsolutePath(optional=True), "",
                       "The authority of the nodes' certificates (PEM): nobody is served who shows none.")
    tokens: str = key(Choice(("off", "cluster", "resource")), "off",
                      "Tokens that nodes show to each other (docs/tokens.md): none; one for all of the cluster, for "
                      "whoever may use the tracker; or one for each image's data, for whoever has shown its registry a "
                      "credential that may pull it. The same as `peers.tokens`.")
    registries: tuple[str, ...] = key(List(_REGISTRY, "hosts", REGISTRY_COUNT_MAX), (),
                                      "The registries, as in image references, that are asked for that; empty: any but "
                                      "this machine's own.")
    preheat_auth: str = key(Choice(("off", "none", "basic", "oauth", "custom")), "off",
                            "Harbor's preheat interface (docs/preheat.md): not served; served to everybody; to who "
                            "shows what is in `preheat_secret_file`, as Harbor's authentication modes of these names.")
    preheat_secret_file: str = key(AbsolutePath(optional=True), "",
                                   "A file with it on its first line (16 characters or more), readable for root only: "
                                   "USER:PASSWORD (basic), a token (oauth), HEADER:VALUE (custom).")
    preheat_clusters: tuple[str, ...] = key(List(Name(), "names", CLUSTER_COUNT_MAX), (),
                                            "The clusters that Harbor preheats; it knows them as 1, 2 and so on. "
                                            "Empty: all that the tracker knows.")
    keys_dir: str = key(AbsolutePath(optional=True), "",
                        "Where the keys are that tokens are signed with; made when it is not there, shared by several "
                        "trackers of one address; empty: a key in memory, and nodes need new tokens after a restart.")
    keys_rotate_s: float = key(Number(0, 366 * 86_400.0), 30 * 86_400.0,
                               "A new key is made when the newest in `keys_dir` is that old; 0: the operator does.",
                               unit="s")

    def problems(self) -> list[tuple[str, str]]:
        """What no key can see alone: texts and hints."""
        pairs = (("cert_file", "key_file"), ("key_file", "cert_file"), ("ca_file", "cert_file"),
                 ("redis_password_file", "redis"))
        if self.preheat_auth in {"basic", "oauth", "custom"} and not self.preheat_secret_file:
            return [("tracker.preheat_auth: expected tracker.preheat_secret_file beside it, found none", "")]
        return [(f"tracker.{given}: expected tracker.{missing} beside it, found none", "")
                for given, missing in pairs if getattr(self, given) and not getattr(self, missing)]
