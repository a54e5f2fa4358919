"""
The tracker: who is in a cluster and in which swarms, and who may have what.

Layer: tracker, a service of its own, beside fetch, above peers.
"""
