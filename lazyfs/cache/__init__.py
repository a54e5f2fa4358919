"""
The node's local chunk cache: one sparse file of uncompressed bytes and one presence map a layer device.

Layer: above lazyfs.image, below lazyfs.fetch. Does local disk I/O only, never the network.
"""
