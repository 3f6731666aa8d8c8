"""What every service shares: builder, lifecycle, configuration, errors, telemetry."""
