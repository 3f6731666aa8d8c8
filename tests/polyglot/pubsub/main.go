// Google's own Pub/Sub client for Go, with only PUBSUB_EMULATOR_HOST set: runs the scenarios that its arguments
// name, each on a topic of its own, and prints a JSON line for each with what went wrong, if anything.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"cloud.google.com/go/pubsub/v2"
	pb "cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
)

const (
	project = "acme"
	within  = 3 * time.Minute
)

type scenario func(context.Context, *world) error

var scenarios = map[string]scenario{
	"ordering":    ordering,
	"redelivery":  redelivery,
	"dead-letter": deadLetter,
	"filter":      filter,
	"large":       large,
	"in-flight":   inFlight,
	"resume":      resume,
	"seek":        seek,
	"snapshot":    snapshot,
	"settings":    settings,
	"detach":      detach,
	"cancel":      cancel,
	"restart":     restart,
}

// world is what a scenario has: a client, and a topic of its own.
type world struct {
	client *pubsub.Client
	name   string
	topic  string
	work   string
}

func main() {
	ctx := context.Background()
	client, err := pubsub.NewClient(ctx, project)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	out := json.NewEncoder(os.Stdout)
	for _, name := range os.Args[1:] {
		out.Encode(map[string]string{"scenario": name, "error": run(ctx, client, name)})
	}
	client.Close()
}

func run(ctx context.Context, client *pubsub.Client, name string) string {
	ctx, end := context.WithTimeout(ctx, within)
	defer end()
	w := &world{client: client, name: name}
	w.topic = fmt.Sprintf("projects/%s/topics/%s", project, name)
	w.work = fmt.Sprintf("projects/%s/subscriptions/%s", project, name)
	if _, err := client.TopicAdminClient.CreateTopic(ctx, &pb.Topic{Name: w.topic}); err != nil {
		return fmt.Sprintf("create topic: %v", err)
	}
	run, known := scenarios[name]
	if !known {
		return "no such scenario"
	}
	if err := run(ctx, w); err != nil {
		return err.Error()
	}
	return ""
}

func (w *world) subscribe(ctx context.Context, subscription *pb.Subscription) error {
	if subscription.Name == "" {
		subscription.Name = w.work
	}
	if subscription.Topic == "" {
		subscription.Topic = w.topic
	}
	_, err := w.client.SubscriptionAdminClient.CreateSubscription(ctx, subscription)
	return err
}

func (w *world) publish(ctx context.Context, messages ...*pubsub.Message) error {
	publisher := w.client.Publisher(w.topic)
	publisher.EnableMessageOrdering = true
	defer publisher.Stop()
	var results []*pubsub.PublishResult
	for _, message := range messages {
		results = append(results, publisher.Publish(ctx, message))
	}
	for _, result := range results {
		if _, err := result.Get(ctx); err != nil {
			return fmt.Errorf("publish: %w", err)
		}
	}
	return nil
}

// receive hands every message to handle until that says that it is enough.
func (w *world) receive(
	ctx context.Context, subscription string, settings func(*pubsub.Subscriber), handle func(*pubsub.Message) bool,
) error {
	ctx, end := context.WithCancel(ctx)
	defer end()
	subscriber := w.client.Subscriber(subscription)
	subscriber.ReceiveSettings.NumGoroutines = 1
	if settings != nil {
		settings(subscriber)
	}
	enough := false
	turn := make(chan struct{}, 1)
	err := subscriber.Receive(ctx, func(_ context.Context, message *pubsub.Message) {
		turn <- struct{}{}
		defer func() { <-turn }()
		if enough {
			message.Nack()
			return
		}
		if handle(message) {
			enough = true
			end()
		}
	})
	if err == nil && !enough {
		err = fmt.Errorf("the subscriber ended before it had everything")
	}
	return err
}
