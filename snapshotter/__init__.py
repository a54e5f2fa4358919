"""containerd's remote snapshotter: ordinary layers as overlayfs keeps them, lazy images mounted below the overlay."""
