'use strict';

// The bootstrap of @grpc/grpc-js-xds knows only `insecure` and `google_default` for the channel to the control
// plane. This puts mutual TLS in the place of `google_default`, from the same files that the bootstrap names for
// the other languages; they are read again when they change. The module that is changed here is internal to the
// package, hence the pinned minor version.

const fs = require('fs');
const path = require('path');

// The program's own copy of the packages, wherever this file lies.
const from = { paths: [path.dirname(path.resolve(process.argv[1] || '.')), process.cwd(), __dirname] };
const { experimental } = require(require.resolve('@grpc/grpc-js', from));
const target = require(require.resolve('@grpc/grpc-js-xds/build/src/google-default-credentials', from));

const REFRESH_MS = 1000;

function files() {
  const inline = process.env.GRPC_XDS_BOOTSTRAP_CONFIG;
  // As gRPC: the path comes first.
  const file = process.env.GRPC_XDS_BOOTSTRAP;
  const bootstrap = JSON.parse(file ? fs.readFileSync(file, 'utf8') : inline || '{}');
  for (const server of bootstrap.xds_servers || []) {
    for (const credentials of server.channel_creds || []) {
      if (credentials.type === 'plexus_tls') return credentials.config;
    }
  }
  throw new Error(`plexus-mesh-preload: no plexus_tls credentials in ${file || 'GRPC_XDS_BOOTSTRAP_CONFIG'}`);
}

target.createGoogleDefaultCredentials = () => {
  const config = files();
  const provider = new experimental.FileWatcherCertificateProvider({
    caCertificateFile: config.ca_certificate_file,
    certificateFile: config.certificate_file,
    privateKeyFile: config.private_key_file,
    refreshIntervalMs: REFRESH_MS,
  });
  return experimental.createCertificateProviderChannelCredentials(provider, provider);
};
