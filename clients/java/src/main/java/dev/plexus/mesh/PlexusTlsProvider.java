package dev.plexus.mesh;

import io.grpc.ChannelCredentials;
import io.grpc.TlsChannelCredentials;
import io.grpc.internal.JsonUtil;
import io.grpc.util.AdvancedTlsX509KeyManager;
import io.grpc.util.AdvancedTlsX509TrustManager;
import io.grpc.xds.XdsCredentialsProvider;
import java.io.File;
import java.io.IOException;
import java.security.GeneralSecurityException;
import java.util.Map;
import java.util.concurrent.Executors;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.TimeUnit;
import java.util.logging.Level;
import java.util.logging.Logger;

/**
 * Channel credentials of the type {@code plexus_tls} in an xDS bootstrap: mutual TLS to the control plane from
 * files that are read again when they change. grpc-java's own type {@code tls} ignores its configuration.
 */
public final class PlexusTlsProvider extends XdsCredentialsProvider {
  private static final Logger log = Logger.getLogger(PlexusTlsProvider.class.getName());
  private static final long REFRESH_SECONDS = 1;

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
    Identity identity = new Identity(config);
    try {
      identity.load();
    } catch (IOException | GeneralSecurityException error) {
      throw new IllegalStateException("plexus_tls: cannot read the certificate files", error);
    }
    // The managers' own schedule never reads more often than once a minute.
    reloading().scheduleWithFixedDelay(
        identity::reload, REFRESH_SECONDS, REFRESH_SECONDS, TimeUnit.SECONDS);
    return TlsChannelCredentials.newBuilder()
        .keyManager(identity.key)
        .trustManager(identity.trust)
        .build();
  }

  private static ScheduledExecutorService reloading() {
    return Executors.newSingleThreadScheduledExecutor(
        task -> {
          Thread thread = new Thread(task, "plexus-tls-reload");
          thread.setDaemon(true);
          return thread;
        });
  }

  /** Three files, of which the CA is written last: when that has changed, the other two are complete. */
  private static final class Identity {
    private final File ca;
    private final File certificate;
    private final File privateKey;
    private final AdvancedTlsX509KeyManager key = new AdvancedTlsX509KeyManager();
    private final AdvancedTlsX509TrustManager trust;
    private long loaded;

    Identity(Map<String, ?> config) {
      ca = file(config, "ca_certificate_file");
      certificate = file(config, "certificate_file");
      privateKey = file(config, "private_key_file");
      try {
        trust = AdvancedTlsX509TrustManager.newBuilder().build();
      } catch (GeneralSecurityException error) {
        throw new IllegalStateException("plexus_tls: no trust manager", error);
      }
    }

    void load() throws IOException, GeneralSecurityException {
      long modified = ca.lastModified();
      key.updateIdentityCredentials(certificate, privateKey);
      trust.updateTrustCredentials(ca);
      loaded = modified;
    }

    void reload() {
      if (ca.lastModified() == loaded) {
        return;
      }
      try {
        load();
      } catch (IOException | GeneralSecurityException | RuntimeException error) {
        log.log(Level.WARNING, "cannot read the certificate files; what was read before stays", error);
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
}
