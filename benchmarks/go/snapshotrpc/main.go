// Command snapshotrpc times Prepare, Mounts and Remove of an ordinary snapshot as containerd calls them: by its own
// API's client in Go, over one connection.
//
//	snapshotrpc SOCKET SNAPSHOTTER NAMESPACE COUNT
//
// prints COUNT lines, each the milliseconds of the three calls together. NAMESPACE may be empty: a proxy snapshotter
// is not told it. Called by benchmarks/noderows/row5.py.
package main

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"time"

	snapshots "github.com/containerd/containerd/api/services/snapshots/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
)

const timeout = 10 * time.Second

func main() {
	if err := measure(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "snapshotrpc:", err)
		os.Exit(1)
	}
}

func measure(words []string) error {
	if len(words) != 4 {
		return fmt.Errorf("expected SOCKET SNAPSHOTTER NAMESPACE COUNT, found %d words", len(words))
	}
	count, err := strconv.Atoi(words[3])
	if err != nil {
		return fmt.Errorf("count: %w", err)
	}
	connection, err := grpc.NewClient("unix://"+words[0], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return fmt.Errorf("connect to %s: %w", words[0], err)
	}
	defer connection.Close()
	ctx := context.Background()
	if words[2] != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "containerd-namespace", words[2])
	}
	client := snapshots.NewSnapshotsClient(connection)
	for number := range count {
		begin := time.Now()
		if err := threeCalls(ctx, client, words[1], fmt.Sprintf("bench-%d-%d", begin.UnixNano(), number)); err != nil {
			return err
		}
		fmt.Printf("%.4f\n", time.Since(begin).Seconds()*1000)
	}
	return nil
}

func threeCalls(ctx context.Context, client snapshots.SnapshotsClient, snapshotter, key string) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	// containerd's own service would collect it between two calls
	kept := map[string]string{"containerd.io/gc.root": "benchmark"}
	prepare := &snapshots.PrepareSnapshotRequest{Snapshotter: snapshotter, Key: key, Labels: kept}
	if _, err := client.Prepare(ctx, prepare); err != nil {
		return fmt.Errorf("prepare: %w", err)
	}
	if _, err := client.Mounts(ctx, &snapshots.MountsRequest{Snapshotter: snapshotter, Key: key}); err != nil {
		return fmt.Errorf("mounts: %w", err)
	}
	if _, err := client.Remove(ctx, &snapshots.RemoveSnapshotRequest{Snapshotter: snapshotter, Key: key}); err != nil {
		return fmt.Errorf("remove: %w", err)
	}
	return nil
}
