// Cri makes one call of Kubernetes' Container Runtime Interface: what kubelet does, one step at a time.
//
//	cri SOCKET METHOD [TIMEOUT] < request.json
//
// METHOD is a method of RuntimeService or ImageService, e.g. PullImage. The request is read from stdin, as it may hold
// credentials, which no command line may; the response is written to stdout: both in protobuf's JSON, with the field
// names of api.proto. A call that fails exits with 1 and writes {"code": "NotFound", "message": "..."}; anything else
// that is wrong exits with 2 and a line on stderr.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	defaultTimeout  = 2 * time.Minute
	maxRequestBytes = 1 << 20
	maxMessageBytes = 16 << 20 // as kubelet
)

func main() {
	if len(os.Args) != 3 && len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: cri SOCKET METHOD [TIMEOUT] < request.json")
		os.Exit(2)
	}
	timeout := defaultTimeout
	if len(os.Args) == 4 {
		var err error
		if timeout, err = time.ParseDuration(os.Args[3]); err != nil {
			fail(err)
		}
	}
	request, err := io.ReadAll(io.LimitReader(os.Stdin, maxRequestBytes))
	if err != nil {
		fail(err)
	}
	response, err := call(os.Args[1], os.Args[2], request, timeout)
	var refused *callError
	if errors.As(err, &refused) {
		answer, _ := json.Marshal(refused)
		fmt.Println(string(answer))
		os.Exit(1)
	}
	if err != nil {
		fail(err)
	}
	fmt.Println(string(response))
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "cri:", err)
	os.Exit(2)
}

// callError is the answer of the other side that is not a response.
type callError struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

func (e *callError) Error() string { return e.Code + ": " + e.Message }

// call makes one call. Services and messages are found by their names in the description that comes with the API.
func call(socket, name string, requestJSON []byte, timeout time.Duration) ([]byte, error) {
	method, err := find(name)
	if err != nil {
		return nil, err
	}
	request, err := newMessage(method.Input())
	if err != nil {
		return nil, err
	}
	if len(requestJSON) > 0 {
		if err := protojson.Unmarshal(requestJSON, request); err != nil {
			return nil, fmt.Errorf("request of %s: %w", name, err)
		}
	}
	response, err := newMessage(method.Output())
	if err != nil {
		return nil, err
	}
	connection, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessageBytes)))
	if err != nil {
		return nil, err
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	path := fmt.Sprintf("/%s/%s", method.Parent().FullName(), method.Name())
	if err := connection.Invoke(ctx, path, request, response); err != nil {
		answer := status.Convert(err)
		return nil, &callError{answer.Code().String(), answer.Message()}
	}
	return protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(response)
}

// find looks a method up by its name, in both services: no name is in both.
func find(name string) (protoreflect.MethodDescriptor, error) {
	services := runtimeapi.File_staging_src_k8s_io_cri_api_pkg_apis_runtime_v1_api_proto.Services()
	for i := range services.Len() {
		method := services.Get(i).Methods().ByName(protoreflect.Name(name))
		if method != nil && !method.IsStreamingServer() {
			return method, nil
		}
	}
	return nil, fmt.Errorf("the CRI has no method %q that answers once", name)
}

func newMessage(descriptor protoreflect.MessageDescriptor) (proto.Message, error) {
	found, err := protoregistry.GlobalTypes.FindMessageByName(descriptor.FullName())
	if err != nil {
		return nil, err
	}
	return found.New().Interface(), nil
}
