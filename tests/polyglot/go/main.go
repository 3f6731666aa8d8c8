// A client and a server of the mesh in Go, run by the tests beside it under `plexus join`.
//
//	program call TARGET   calls the method named by each line of stdin, at once, and prints a JSON line for each
//	program serve PORT    answers /test.Who/Ask with its port, every other method with the caller's name
package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"log"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	xdscreds "google.golang.org/grpc/credentials/xds"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	_ "google.golang.org/grpc/xds" // registers the resolver
)

const timeout = 60 * time.Second

// raw sends and receives messages as the bytes they are.
type raw struct{}

func (raw) Name() string                        { return "proto" }
func (raw) Marshal(message any) ([]byte, error) { return *message.(*[]byte), nil }
func (raw) Unmarshal(data []byte, message any) error {
	*message.(*[]byte) = append([]byte(nil), data...)
	return nil
}

type answer struct {
	Code string `json:"code"`
	Peer string `json:"peer"`
	Body []byte `json:"body"`
	Text string `json:"text"`
}

func call(connection *grpc.ClientConn, method string) answer {
	within, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	var from peer.Peer
	request, response := []byte{}, []byte{}
	err := connection.Invoke(within, method, &request, &response, grpc.ForceCodec(raw{}), grpc.Peer(&from))
	got := answer{Code: status.Code(err).String(), Body: response, Text: status.Convert(err).Message()}
	if from.Addr != nil {
		got.Peer = from.Addr.String()
	}
	return got
}

func calls(target string) error {
	creds, err := xdscreds.NewClientCredentials(xdscreds.ClientOptions{FallbackCreds: insecure.NewCredentials()})
	if err != nil {
		return err
	}
	connection, err := grpc.NewClient(target, grpc.WithTransportCredentials(creds))
	if err != nil {
		return err
	}
	defer connection.Close()
	var running sync.WaitGroup
	var printing sync.Mutex
	lines := bufio.NewScanner(os.Stdin)
	output := json.NewEncoder(os.Stdout)
	for lines.Scan() {
		method := lines.Text()
		running.Go(func() {
			got := call(connection, method)
			printing.Lock()
			defer printing.Unlock()
			_ = output.Encode(got)
		})
	}
	running.Wait()
	return lines.Err()
}

// configuration reads the three files anew: they are replaced.
func configuration(*tls.ClientHelloInfo) (*tls.Config, error) {
	pair, err := tls.LoadX509KeyPair(os.Getenv("PLEXUS_CERTIFICATE_PATH"), os.Getenv("PLEXUS_KEY_PATH"))
	if err != nil {
		return nil, err
	}
	roots, err := os.ReadFile(os.Getenv("PLEXUS_CA_PATH"))
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(roots)
	return &tls.Config{
		Certificates: []tls.Certificate{pair},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    pool,
		NextProtos:   []string{"h2"},
	}, nil
}

func name(_ any, stream grpc.ServerStream) error {
	message := []byte{}
	if err := stream.RecvMsg(&message); err != nil {
		return err
	}
	from, _ := peer.FromContext(stream.Context())
	said := []byte(from.AuthInfo.(credentials.TLSInfo).SPIFFEID.String())
	if method, _ := grpc.MethodFromServerStream(stream); method == "/test.Who/Ask" {
		said = []byte(os.Args[2])
	}
	return stream.SendMsg(&said)
}

func serve(port string) error {
	listener, err := net.Listen("tcp", "127.0.0.1:"+port)
	if err != nil {
		return err
	}
	creds := credentials.NewTLS(&tls.Config{GetConfigForClient: configuration})
	server := grpc.NewServer(
		grpc.Creds(creds), grpc.ForceServerCodec(raw{}), grpc.UnknownServiceHandler(name))
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		<-ended
		server.GracefulStop()
	}()
	return server.Serve(listener)
}

func main() {
	if len(os.Args) != 3 {
		log.Fatal("call TARGET, or serve PORT")
	}
	act := map[string]func(string) error{"call": calls, "serve": serve}[os.Args[1]]
	if act == nil {
		log.Fatalf("no such part: %s", os.Args[1])
	}
	if err := act(os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
