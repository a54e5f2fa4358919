"""
Peers: nodes give each other what the registry gave one of them.

Layer: peers, below fetch and node, beside registry and cache. Nothing here knows a mount, a table or a registry: a
resource is a number of pieces, told apart by digest. model says what passes between the parts.
"""
