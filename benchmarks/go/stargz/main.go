// stargz-snapshotter's file system as a program of its own, without containerd: for benchmarks.compare.
//
//	stargz build LAYER OUT FIRST   make an eStargz layer; FIRST: a file with the paths that come first; prints JSON
//	stargz mount ROOT SPEC TOP     mount the layers in SPEC below TOP, print "ready"; unmount when stdin ends
//
// What `mount` does with a layer is what the snapshotter does in Prepare (Mount) and Mounts (Check, which waits for what
// is prefetched). Without background fetch, which only costs a start time.
package main

import (
	"bufio"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/stargz-snapshotter/estargz"
	stargzfs "github.com/containerd/stargz-snapshotter/fs"
	"github.com/containerd/stargz-snapshotter/fs/config"
	"github.com/containerd/stargz-snapshotter/fs/source"
)

const label = "containerd.io/snapshot/remote/stargz."

// Layer is what `build` prints; SPEC holds a list of them, the lowest first.
type Layer struct {
	Digest string `json:"digest"`
	Size   int64  `json:"size"`
	TOC    string `json:"toc"`
}

// Spec is an image.
type Spec struct {
	Reference string  `json:"reference"`
	Layers    []Layer `json:"layers"`
}

func main() {
	var err error
	switch {
	case len(os.Args) == 5 && os.Args[1] == "build":
		err = build(os.Args[2], os.Args[3], os.Args[4])
	case len(os.Args) == 5 && os.Args[1] == "mount":
		err = mount(os.Args[2], os.Args[3], os.Args[4])
	default:
		err = fmt.Errorf("usage: stargz build LAYER OUT FIRST | mount ROOT SPEC TOP")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "stargz:", err)
		os.Exit(1)
	}
}

func build(layer, out, first string) error {
	list, err := os.ReadFile(first)
	if err != nil {
		return err
	}
	source, err := os.Open(layer)
	if err != nil {
		return err
	}
	defer source.Close()
	info, err := source.Stat()
	if err != nil {
		return err
	}
	options := []estargz.Option{estargz.WithCompressionLevel(gzip.DefaultCompression)}
	if files := strings.Fields(string(list)); len(files) > 0 {
		var missed []string
		options = append(options, estargz.WithPrioritizedFiles(files), estargz.WithAllowPrioritizeNotFound(&missed))
	}
	blob, err := estargz.Build(io.NewSectionReader(source, 0, info.Size()), options...)
	if err != nil {
		return err
	}
	defer blob.Close()
	target, err := os.Create(out)
	if err != nil {
		return err
	}
	defer target.Close()
	hash := sha256.New()
	size, err := io.Copy(io.MultiWriter(target, hash), blob)
	if err != nil {
		return err
	}
	digest := fmt.Sprintf("sha256:%x", hash.Sum(nil))
	return json.NewEncoder(os.Stdout).Encode(Layer{digest, size, blob.TOCDigest().String()})
}

func mount(root, specFile, top string) error {
	data, err := os.ReadFile(specFile)
	if err != nil {
		return err
	}
	var spec Spec
	if err := json.Unmarshal(data, &spec); err != nil {
		return err
	}
	plain := func(ref reference.Spec) ([]docker.RegistryHost, error) {
		everywhere := func(string) (bool, error) { return true, nil }
		return docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(everywhere))(ref.Hostname())
	}
	settings := config.Config{NoPrometheus: true, NoBackgroundFetch: true}
	files, err := stargzfs.NewFilesystem(root, settings, stargzfs.WithGetSources(source.FromDefaultLabels(plain)))
	if err != nil {
		return err
	}
	var digests []string
	for _, layer := range spec.Layers {
		digests = append(digests, layer.Digest)
	}
	var points []string
	defer func() {
		for _, point := range points {
			_ = files.Unmount(context.Background(), point)
		}
	}()
	labels := map[string]string{label + "reference": spec.Reference, label + "layers": strings.Join(digests, ",")}
	for number, layer := range spec.Layers {
		labels[label+"digest"] = layer.Digest
		labels[estargz.TOCJSONDigestAnnotation] = layer.TOC
		point := filepath.Join(top, strconv.Itoa(number))
		if err := os.MkdirAll(point, 0o755); err != nil {
			return err
		}
		if err := files.Mount(context.Background(), point, labels); err != nil {
			return err
		}
		points = append(points, point)
	}
	for _, point := range points {
		if err := files.Check(context.Background(), point, labels); err != nil {
			return err
		}
	}
	fmt.Println("ready")
	_, _ = bufio.NewReader(os.Stdin).ReadString(0)
	return nil
}
