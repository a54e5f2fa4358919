"""
Credentials that kubelet pulls with: seen by a proxy of CRI's image service, handed over to the node's daemon.

    keep = PulledCredentials()
    feeder = Feeder(keep, daemon_dir().socket)
    proxy = ImageServiceProxy("/run/containerd/containerd.sock", feeder.note)
    proxy.add_to(server)          # a grpc.Server, before it starts

Layer: snapshotter. Who calls: the command line (`lazyfs snapshotter`).
"""
