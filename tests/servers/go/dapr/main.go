// A daprd for service invocation alone: Dapr's own runtime, without its hundred components. Applications
// are found by a file, which works on one machine without multicast.
package main

import (
	"context"
	"log"
	"os"

	"github.com/dapr/components-contrib/nameresolution/sqlite"
	"github.com/dapr/dapr/cmd/daprd/options"
	nameresolution "github.com/dapr/dapr/pkg/components/nameresolution"
	"github.com/dapr/dapr/pkg/healthz"
	"github.com/dapr/dapr/pkg/metrics"
	"github.com/dapr/dapr/pkg/modes"
	"github.com/dapr/dapr/pkg/runtime"
	"github.com/dapr/dapr/pkg/runtime/registry"
	"github.com/dapr/dapr/pkg/security"
	"github.com/dapr/kit/concurrency"
	"github.com/dapr/kit/logger"
	"github.com/dapr/kit/signals"
)

func main() {
	given, err := options.New(os.Args[1:])
	if err != nil {
		log.Fatal(err)
	}
	given.Logger.SetAppID(given.AppID)
	if err := logger.ApplyOptionsToLoggers(&given.Logger); err != nil {
		log.Fatal(err)
	}
	if err := run(signals.Context(), given, healthz.New()); err != nil {
		log.Fatal(err)
	}
}

// run is a daprd: its identity from sentry, then its runtime.
func run(ctx context.Context, given *options.Options, health healthz.Healthz) error {
	identity, err := security.New(ctx, security.Options{
		SentryAddress:           given.SentryAddress,
		ControlPlaneTrustDomain: given.ControlPlaneTrustDomain,
		ControlPlaneNamespace:   given.ControlPlaneNamespace,
		TrustAnchors:            given.TrustAnchors,
		AppID:                   given.AppID,
		MTLSEnabled:             given.EnableMTLS,
		Mode:                    modes.DaprMode(given.Mode),
		Healthz:                 health,
	})
	if err != nil {
		return err
	}
	serve := func(ctx context.Context) error {
		handler, err := identity.Handler(ctx)
		if err != nil {
			return err
		}
		daprd, err := runtime.FromConfig(ctx, configuration(given, handler, health))
		if err != nil {
			return err
		}
		return daprd.Run(ctx)
	}
	return concurrency.NewRunnerManager(identity.Run, serve).Run(ctx)
}

// configuration hands the command line on; what invocation does not use stays at its zero value.
func configuration(given *options.Options, handler security.Handler, health healthz.Healthz) *runtime.Config {
	names := nameresolution.NewRegistry()
	names.Logger = logger.NewLogger("dapr.contrib")
	names.RegisterComponent(sqlite.NewResolver, "sqlite")
	return &runtime.Config{
		AppID:                         given.AppID,
		AppProtocol:                   given.AppProtocol,
		ApplicationPort:               given.AppPort,
		AppChannelAddress:             given.AppChannelAddress,
		AppMaxConcurrency:             given.AppMaxConcurrency,
		AppHealthCheckPath:            given.AppHealthCheckPath,
		AppHealthProbeInterval:        given.AppHealthProbeInterval,
		AppHealthProbeTimeout:         given.AppHealthProbeTimeout,
		AppHealthThreshold:            given.AppHealthThreshold,
		AllowedOrigins:                given.AllowedOrigins,
		Config:                        given.Config,
		ResourcesPath:                 given.ResourcesPath,
		Mode:                          given.Mode,
		DaprHTTPPort:                  given.DaprHTTPPort,
		DaprAPIGRPCPort:               given.DaprAPIGRPCPort,
		DaprAPIListenAddresses:        given.DaprAPIListenAddresses,
		DaprInternalGRPCPort:          given.DaprInternalGRPCPort,
		DaprInternalGRPCListenAddress: given.DaprInternalGRPCListenAddress,
		DaprPublicPort:                given.DaprPublicPort,
		DaprPublicListenAddress:       given.DaprPublicListenAddress,
		ProfilePort:                   given.ProfilePort,
		DaprGracefulShutdownSeconds:   given.DaprGracefulShutdownSeconds,
		EnableAPILogging:              given.EnableAPILogging,
		EnableMTLS:                    given.EnableMTLS,
		SentryAddress:                 given.SentryAddress,
		MaxRequestSize:                given.MaxRequestSize,
		ReadBufferSize:                given.ReadBufferSize,
		DisableBuiltinK8sSecretStore:  true,
		Metrics: metrics.Options{
			Enabled:       given.Metrics.Enabled(),
			Log:           logger.NewLogger("dapr.runtime"),
			Port:          given.Metrics.Port(),
			ListenAddress: "127.0.0.1",
			Namespace:     metrics.DefaultMetricNamespace,
			Healthz:       health,
		},
		Registry: registry.NewOptions().WithNameResolutions(names),
		Security: handler,
		Healthz:  health,
	}
}
