"""
containerd's gRPC interfaces, as far as we speak them: our own .proto files, wire-compatible, and the code made of them.

Field numbers and names are those of containerd; nothing else is. `scripts/protos` makes the code again, a test says
whether it is current. Layer: the lowest of snapshotter.
"""
