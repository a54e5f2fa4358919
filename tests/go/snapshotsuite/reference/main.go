// Reference serves containerd's own overlayfs snapshotter on a unix socket: the harness is proved on it, and it is what
// the latency of our calls is compared with.
//
//	reference SOCKET ROOT
//
// It ends on SIGTERM or SIGINT.
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"syscall"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"google.golang.org/grpc"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: reference SOCKET ROOT")
		os.Exit(2)
	}
	if err := serve(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "reference:", err)
		os.Exit(1)
	}
}

func serve(socket, root string) error {
	snapshotter, err := overlay.NewSnapshotter(root)
	if err != nil {
		return fmt.Errorf("overlayfs snapshotter in %s: %w", root, err)
	}
	defer snapshotter.Close()
	if err := makeBuckets(snapshotter); err != nil {
		return err
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(snapshotter))
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		<-signals
		server.GracefulStop()
	}()
	return server.Serve(listener)
}

// makeBuckets makes the tables of its records, which it does not do before its first snapshot: List fails until then.
func makeBuckets(snapshotter snapshots.Snapshotter) error {
	ctx := namespaces.WithNamespace(context.Background(), "reference")
	if _, err := snapshotter.Prepare(ctx, "first", ""); err != nil {
		return fmt.Errorf("prepare the first snapshot: %w", err)
	}
	return snapshotter.Remove(ctx, "first")
}
