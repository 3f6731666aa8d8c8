package dev.plexus.mesh;

import io.grpc.ChannelCredentials;
import io.grpc.TlsChannelCredentials;
import io.grpc.internal.JsonUtil;
import io.grpc.util.AdvancedTlsX509KeyManager;
import io.grpc.util.AdvancedTlsX509TrustManager;
import io.grpc.xds.XdsCredentialsProvider;
import java.io.File;
import java.util.Map;
import java.util.concurrent.Executors;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.TimeUnit;

/**
 * Channel credentials of the type {@code plexus_tls} in an xDS bootstrap: mutual TLS to the control plane from
 * files that are read again when they change. grpc-java's own type {@code tls} ignores its configuration.
 */
public final class PlexusTlsProvider extends XdsCredentialsProvider {
  private static final long REFRESH_SECONDS = 5;

  @Override
  protected String getName() {
    return "plexus_tls";
  }

  @Override
  public boolean isAvailable() {
    return true;
  }

  @Override
  public int priority() {
    return 5;
  }

  @Override
  protected ChannelCredentials newChannelCredentials(Map<String, ?> config) {
    ScheduledExecutorService reload =
        Executors.newSingleThreadScheduledExecutor(
            task -> {
              Thread thread = new Thread(task, "plexus-tls-reload");
              thread.setDaemon(true);
              return thread;
            });
    try {
      AdvancedTlsX509KeyManager key = new AdvancedTlsX509KeyManager();
      key.updateIdentityCredentials(
          file(config, "certificate_file"),
          file(config, "private_key_file"),
          REFRESH_SECONDS,
          TimeUnit.SECONDS,
          reload);
      AdvancedTlsX509TrustManager trust = AdvancedTlsX509TrustManager.newBuilder().build();
      trust.updateTrustCredentials(
          file(config, "ca_certificate_file"), REFRESH_SECONDS, TimeUnit.SECONDS, reload);
      return TlsChannelCredentials.newBuilder().keyManager(key).trustManager(trust).build();
    } catch (Exception error) {
      throw new IllegalStateException("plexus_tls: cannot read the certificate files", error);
    }
  }

  private static File file(Map<String, ?> config, String name) {
    String path = JsonUtil.getString(config, name);
    if (path == null) {
      throw new IllegalArgumentException("plexus_tls: '" + name + "' is required");
    }
    return new File(path);
  }
}
