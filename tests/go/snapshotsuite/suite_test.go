// Package snapshotsuite runs containerd's own conformance suite for snapshotters against a snapshotter that is already
// running, through the proxy client that containerd itself uses for a remote snapshotter.
//
// Called by tests/snapshotter/test_conformance.py (by tests/gokit.py), as root, with
//
//	LAZYFS_SNAPSHOTTER_SOCKET  path of its unix socket
//	TMPDIR                     a directory that is not on overlayfs
//	-test.root -test.parallel 1
//
// The cases share one snapshotter, where the suite means each to have its own: so they run one after the other, each
// must find the snapshotter empty, and each takes away what it made, which is one more test of Remove and Cleanup.
package snapshotsuite

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

const (
	socketVariable = "LAZYFS_SNAPSHOTTER_SOCKET"
	// The suite knows by the name what overlayfs cannot do (rename a directory of a lower layer).
	name         = "overlayfs"
	sweepTimeout = 60 * time.Second
)

func TestSnapshotter(t *testing.T) {
	socket := os.Getenv(socketVariable)
	if socket == "" {
		t.Fatalf("%s is not set: the socket of the snapshotter to test", socketVariable)
	}
	testsuite.SnapshotterSuite(t, name, func(ctx context.Context, _ string) (snapshots.Snapshotter, func() error, error) {
		return connect(ctx, socket)
	})
}

// connect gives a client of its own to each case, and makes sure that the case before has left nothing.
func connect(ctx context.Context, socket string) (snapshots.Snapshotter, func() error, error) {
	connection, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, nil, fmt.Errorf("connect to %s: %w", socket, err)
	}
	client := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(connection), name)
	left, err := list(ctx, client)
	if err == nil && len(left) > 0 {
		err = fmt.Errorf("the snapshotter is not empty: %d snapshots, e.g. %+v", len(left), left[0])
	}
	if err != nil {
		return nil, nil, errors.Join(err, connection.Close())
	}
	return client, func() error {
		return errors.Join(sweep(client), client.Close(), connection.Close())
	}, nil
}

// sweep removes everything, children first, and collects what Remove has put off.
func sweep(client snapshots.Snapshotter) error {
	ctx, cancel := context.WithTimeout(context.Background(), sweepTimeout)
	defer cancel()
	for {
		found, err := list(ctx, client)
		if err != nil || len(found) == 0 {
			return errors.Join(err, cleanup(ctx, client))
		}
		parents := map[string]bool{}
		for _, info := range found {
			parents[info.Parent] = true
		}
		removed := false
		for _, info := range found {
			if parents[info.Name] {
				continue
			}
			if err := client.Remove(ctx, info.Name); err != nil {
				return fmt.Errorf("remove %s, which has no child: %w", info.Name, err)
			}
			removed = true
		}
		if !removed {
			return fmt.Errorf("every one of %d snapshots is some other's parent", len(found))
		}
	}
}

// list gives every snapshot.
func list(ctx context.Context, client snapshots.Snapshotter) ([]snapshots.Info, error) {
	var found []snapshots.Info
	err := client.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		found = append(found, info)
		return nil
	})
	return found, err
}

func cleanup(ctx context.Context, client snapshots.Snapshotter) error {
	cleaner, ok := client.(snapshots.Cleaner)
	if !ok {
		return errors.New("the proxy client has no Cleanup")
	}
	if err := cleaner.Cleanup(ctx); err != nil && !errdefs.IsNotImplemented(err) {
		return fmt.Errorf("cleanup: %w", err)
	}
	return nil
}
