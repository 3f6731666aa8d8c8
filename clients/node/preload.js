'use strict';

// The bootstrap of @grpc/grpc-js-xds knows only `insecure` and `google_default` for the channel to the control
// plane. This puts mutual TLS in the place of `google_default`, from the same files that the bootstrap names for
// the other languages. The module below is internal to the package, hence the pinned minor version.

const fs = require('fs');
const path = require('path');

const from = { paths: [process.cwd(), __dirname] };
const grpc = require(require.resolve('@grpc/grpc-js', from));
const target = require(require.resolve('@grpc/grpc-js-xds/build/src/google-default-credentials', from));

function files() {
  const inline = process.env.GRPC_XDS_BOOTSTRAP_CONFIG;
  const bootstrap = JSON.parse(inline || fs.readFileSync(process.env.GRPC_XDS_BOOTSTRAP, 'utf8'));
  for (const server of bootstrap.xds_servers) {
    for (const credentials of server.channel_creds) {
      if (credentials.type === 'plexus_tls') return credentials.config;
    }
  }
  throw new Error(`no plexus_tls credentials in ${process.env.GRPC_XDS_BOOTSTRAP || 'GRPC_XDS_BOOTSTRAP_CONFIG'}`);
}

target.createGoogleDefaultCredentials = () => {
  const config = files();
  const read = (name) => fs.readFileSync(path.resolve(config[name]));
  return grpc.credentials.createSsl(
    read('ca_certificate_file'),
    read('private_key_file'),
    read('certificate_file')
  );
};
