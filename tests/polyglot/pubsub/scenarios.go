package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"os/signal"
	"syscall"
	"time"

	"cloud.google.com/go/pubsub/v2"
	pb "cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"google.golang.org/api/iterator"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

func text(data string) *pubsub.Message { return &pubsub.Message{Data: []byte(data)} }

// ordering: each key's messages come in the order they were published in, each acknowledgement is confirmed.
func ordering(ctx context.Context, w *world) error {
	once := &pb.Subscription{EnableMessageOrdering: true, EnableExactlyOnceDelivery: true, AckDeadlineSeconds: 60}
	if err := w.subscribe(ctx, once); err != nil {
		return err
	}
	const keys, each = 5, 20
	var messages []*pubsub.Message
	for n := range keys * each {
		data := fmt.Sprint(n / keys)
		messages = append(messages, &pubsub.Message{Data: []byte(data), OrderingKey: fmt.Sprint(n % keys)})
	}
	if err := w.publish(ctx, messages...); err != nil {
		return err
	}
	next := map[string]int{}
	var wrong error
	count := 0
	var results []*pubsub.AckResult
	err := w.receive(ctx, w.work, nil, func(message *pubsub.Message) bool {
		key := message.OrderingKey
		if string(message.Data) != fmt.Sprint(next[key]) {
			wrong = fmt.Errorf("key %s: got %s instead of %d", key, message.Data, next[key])
		}
		next[key]++
		count++
		results = append(results, message.AckWithResult())
		return wrong != nil || count == keys*each
	})
	for _, result := range results {
		if got, err := result.Get(ctx); err != nil || got != pubsub.AcknowledgeStatusSuccess {
			return fmt.Errorf("acknowledgement: %v, %w", got, err)
		}
	}
	return errors.Join(err, wrong)
}

// redelivery: what is refused comes again, what is acknowledged does not.
func redelivery(ctx context.Context, w *world) error {
	if err := w.subscribe(ctx, &pb.Subscription{}); err != nil {
		return err
	}
	if err := w.publish(ctx, text("a"), text("b")); err != nil {
		return err
	}
	seen := map[string]int{}
	return w.receive(ctx, w.work, nil, func(message *pubsub.Message) bool {
		data := string(message.Data)
		seen[data]++
		if seen[data] < 3 {
			message.Nack()
		} else {
			message.Ack()
		}
		return seen["a"] == 3 && seen["b"] == 3
	})
}

func deadLetter(ctx context.Context, w *world) error {
	graves := w.topic + "-graves"
	if _, err := w.client.TopicAdminClient.CreateTopic(ctx, &pb.Topic{Name: graves}); err != nil {
		return err
	}
	mourner := &pb.Subscription{Name: w.work + "-mourner", Topic: graves}
	if err := w.subscribe(ctx, mourner); err != nil {
		return err
	}
	policy := &pb.DeadLetterPolicy{DeadLetterTopic: graves, MaxDeliveryAttempts: 5}
	retry := &pb.RetryPolicy{MinimumBackoff: durationpb.New(0), MaximumBackoff: durationpb.New(time.Second)}
	if err := w.subscribe(ctx, &pb.Subscription{DeadLetterPolicy: policy, RetryPolicy: retry}); err != nil {
		return err
	}
	if err := w.publish(ctx, text("poison")); err != nil {
		return err
	}
	attempts := 0
	var wrong error
	err := w.receive(ctx, w.work, nil, func(message *pubsub.Message) bool {
		attempts++
		if message.DeliveryAttempt == nil || *message.DeliveryAttempt != attempts {
			wrong = fmt.Errorf("attempt %d is told as %v", attempts, message.DeliveryAttempt)
		}
		message.Nack()
		return wrong != nil || attempts == 5
	})
	if err := errors.Join(err, wrong); err != nil {
		return err
	}
	return w.receive(ctx, mourner.Name, nil, func(message *pubsub.Message) bool {
		message.Ack()
		return string(message.Data) == "poison"
	})
}

func filter(ctx context.Context, w *world) error {
	expression := `hasPrefix(attributes.kind, "in") AND NOT attributes:test`
	if err := w.subscribe(ctx, &pb.Subscription{Filter: expression}); err != nil {
		return err
	}
	messages := []*pubsub.Message{
		{Data: []byte("other"), Attributes: map[string]string{"kind": "order"}},
		{Data: []byte("test"), Attributes: map[string]string{"kind": "invoice", "test": ""}},
		{Data: []byte("wanted"), Attributes: map[string]string{"kind": "invoice"}},
	}
	if err := w.publish(ctx, messages...); err != nil {
		return err
	}
	var got string
	err := w.receive(ctx, w.work, nil, func(message *pubsub.Message) bool {
		got = string(message.Data)
		message.Ack()
		return true
	})
	if err == nil && got != "wanted" {
		err = fmt.Errorf("got %s", got)
	}
	return err
}

// large: messages near the bound of 10 MiB, as they are and compressed.
func large(ctx context.Context, w *world) error {
	if err := w.subscribe(ctx, &pb.Subscription{}); err != nil {
		return err
	}
	noise := make([]byte, 9<<20)
	rand.New(rand.NewSource(1)).Read(noise)
	wanted := map[[32]byte]bool{}
	for _, compressed := range []bool{false, true} {
		data := noise
		if compressed {
			data = bytes.Repeat([]byte("plexus "), len(noise)/7)
		}
		wanted[sha256.Sum256(data)] = true
		publisher := w.client.Publisher(w.topic)
		publisher.PublishSettings.EnableCompression = compressed
		publisher.PublishSettings.CompressionBytesThreshold = 1
		_, err := publisher.Publish(ctx, &pubsub.Message{Data: data}).Get(ctx)
		publisher.Stop()
		if err != nil {
			return fmt.Errorf("publish: %w", err)
		}
	}
	return w.receive(ctx, w.work, nil, func(message *pubsub.Message) bool {
		message.Ack()
		delete(wanted, sha256.Sum256(message.Data))
		return len(wanted) == 0
	})
}

// inFlight: a thousand messages are held at once before the first is acknowledged.
func inFlight(ctx context.Context, w *world) error {
	if err := w.subscribe(ctx, &pb.Subscription{}); err != nil {
		return err
	}
	const count = 1000
	var messages []*pubsub.Message
	for n := range count {
		messages = append(messages, text(fmt.Sprint(n)))
	}
	if err := w.publish(ctx, messages...); err != nil {
		return err
	}
	held := map[string]*pubsub.Message{}
	settings := func(subscriber *pubsub.Subscriber) {
		subscriber.ReceiveSettings.MaxOutstandingMessages = count
		subscriber.ReceiveSettings.EnablePerStreamFlowControl = true
	}
	return w.receive(ctx, w.work, settings, func(message *pubsub.Message) bool {
		held[string(message.Data)] = message
		if len(held) < count {
			return false
		}
		for _, message := range held {
			message.Ack()
		}
		return true
	})
}

// resume: after a failure a key is paused until the program says that it goes on.
func resume(ctx context.Context, w *world) error {
	publisher := w.client.Publisher(w.topic)
	publisher.EnableMessageOrdering = true
	defer publisher.Stop()
	admin := w.client.TopicAdminClient
	if err := admin.DeleteTopic(ctx, &pb.DeleteTopicRequest{Topic: w.topic}); err != nil {
		return err
	}
	publish := func() error {
		_, err := publisher.Publish(ctx, &pubsub.Message{Data: []byte("x"), OrderingKey: "k"}).Get(ctx)
		return err
	}
	if err := publish(); status.Code(err) != codes.NotFound {
		return fmt.Errorf("publish without the topic: %w", err)
	}
	if _, err := admin.CreateTopic(ctx, &pb.Topic{Name: w.topic}); err != nil {
		return err
	}
	if err := publish(); !errors.As(err, &pubsub.ErrPublishingPaused{}) {
		return fmt.Errorf("publish while paused: %w", err)
	}
	publisher.ResumePublish("k")
	return publish()
}

// seek: to a time, past what waits.
func seek(ctx context.Context, w *world) error {
	if err := w.subscribe(ctx, &pb.Subscription{}); err != nil {
		return err
	}
	if err := w.publish(ctx, text("old")); err != nil {
		return err
	}
	hence := &pb.SeekRequest_Time{Time: timestamppb.New(time.Now().Add(time.Hour))}
	request := &pb.SeekRequest{Subscription: w.work, Target: hence}
	if _, err := w.client.SubscriptionAdminClient.Seek(ctx, request); err != nil {
		return err
	}
	if err := w.publish(ctx, text("new")); err != nil {
		return err
	}
	return w.only(ctx, "new")
}

// only receives until it has these messages, and fails for any other.
func (w *world) only(ctx context.Context, wanted ...string) error {
	left := map[string]bool{}
	for _, data := range wanted {
		left[data] = true
	}
	var wrong error
	err := w.receive(ctx, w.work, nil, func(message *pubsub.Message) bool {
		if !left[string(message.Data)] {
			wrong = fmt.Errorf("got %s", message.Data)
		}
		delete(left, string(message.Data))
		message.Ack()
		return wrong != nil || len(left) == 0
	})
	return errors.Join(err, wrong)
}

// snapshot: back to what was held, and what came since.
func snapshot(ctx context.Context, w *world) error {
	if err := w.subscribe(ctx, &pb.Subscription{}); err != nil {
		return err
	}
	if err := w.publish(ctx, text("held")); err != nil {
		return err
	}
	admin := w.client.SubscriptionAdminClient
	name := fmt.Sprintf("projects/%s/snapshots/%s", project, w.name)
	if _, err := admin.CreateSnapshot(ctx, &pb.CreateSnapshotRequest{Name: name, Subscription: w.work}); err != nil {
		return err
	}
	if err := w.publish(ctx, text("later")); err != nil {
		return err
	}
	if err := w.only(ctx, "held", "later"); err != nil {
		return err
	}
	target := &pb.SeekRequest_Snapshot{Snapshot: name}
	if _, err := admin.Seek(ctx, &pb.SeekRequest{Subscription: w.work, Target: target}); err != nil {
		return err
	}
	return w.only(ctx, "held", "later")
}

func settings(ctx context.Context, w *world) error {
	admin := w.client.SubscriptionAdminClient
	if err := w.subscribe(ctx, &pb.Subscription{Labels: map[string]string{"team": "a"}}); err != nil {
		return err
	}
	changed, err := admin.UpdateSubscription(ctx, &pb.UpdateSubscriptionRequest{
		Subscription: &pb.Subscription{Name: w.work, AckDeadlineSeconds: 77},
		UpdateMask:   &fieldmaskpb.FieldMask{Paths: []string{"ack_deadline_seconds"}},
	})
	if err != nil {
		return err
	}
	if changed.AckDeadlineSeconds != 77 || changed.Labels["team"] != "a" {
		return fmt.Errorf("changed to %v", changed)
	}
	if _, err := admin.CreateSubscription(ctx, changed); status.Code(err) != codes.AlreadyExists {
		return fmt.Errorf("created twice: %w", err)
	}
	found := admin.ListSubscriptions(ctx, &pb.ListSubscriptionsRequest{Project: "projects/" + project, PageSize: 1})
	for {
		subscription, err := found.Next()
		if err == iterator.Done {
			return fmt.Errorf("not listed")
		}
		if err != nil {
			return err
		}
		if subscription.Name == w.work {
			return nil
		}
	}
}

// detach: the subscriber learns that it gets nothing more.
func detach(ctx context.Context, w *world) error {
	if err := w.subscribe(ctx, &pb.Subscription{}); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() {
		ended <- w.client.Subscriber(w.work).Receive(ctx, func(context.Context, *pubsub.Message) {})
	}()
	request := &pb.DetachSubscriptionRequest{Subscription: w.work}
	if _, err := w.client.TopicAdminClient.DetachSubscription(ctx, request); err != nil {
		return err
	}
	if err := <-ended; status.Code(err) != codes.FailedPrecondition {
		return fmt.Errorf("the subscriber ended with %w", err)
	}
	return nil
}

// cancel: a subscriber that goes away at once gives back what it has begun with, and the next gets all of it: the
// rest when its leases end.
func cancel(ctx context.Context, w *world) error {
	if err := w.subscribe(ctx, &pb.Subscription{AckDeadlineSeconds: 600}); err != nil {
		return err
	}
	var wanted []string
	var messages []*pubsub.Message
	for n := range 50 {
		wanted = append(wanted, fmt.Sprint(n))
		messages = append(messages, text(fmt.Sprint(n)))
	}
	if err := w.publish(ctx, messages...); err != nil {
		return err
	}
	now := func(subscriber *pubsub.Subscriber) {
		subscriber.ReceiveSettings.MaxDurationPerAckExtension = 10 * time.Second
		subscriber.ReceiveSettings.ShutdownOptions = &pubsub.ShutdownOptions{
			Timeout:  within,
			Behavior: pubsub.ShutdownBehaviorNackImmediately,
		}
	}
	if err := w.receive(ctx, w.work, now, func(*pubsub.Message) bool { return true }); err != nil {
		return err
	}
	return w.only(ctx, wanted...)
}

// restart: the server stops and starts again under a subscriber and a publisher that go on by themselves.
func restart(ctx context.Context, w *world) error {
	if err := w.subscribe(ctx, &pb.Subscription{}); err != nil {
		return err
	}
	restarted := make(chan os.Signal, 1)
	signal.Notify(restarted, syscall.SIGUSR1)
	if err := w.publish(ctx, text("before")); err != nil {
		return err
	}
	published := make(chan error, 1)
	seen := map[string]bool{}
	err := w.receive(ctx, w.work, nil, func(message *pubsub.Message) bool {
		message.Ack()
		if seen[string(message.Data)] {
			return false
		}
		seen[string(message.Data)] = true
		if len(seen) == 1 {
			fmt.Println(`{"scenario": "restart", "error": "now"}`)
			go func() {
				<-restarted
				published <- w.publish(ctx, text("after"))
			}()
		}
		return seen["after"]
	})
	if err != nil {
		return err
	}
	return <-published
}
