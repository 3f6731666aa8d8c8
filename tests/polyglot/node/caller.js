'use strict';

// A client of the mesh in Node, run by the tests beside it under `plexus join`: calls the method named by each
// line of stdin, at once, and prints a JSON line for each.

const readline = require('readline');
const grpc = require('@grpc/grpc-js');
const xds = require('@grpc/grpc-js-xds');

const TIMEOUT_MS = 60_000;
const bytes = (message) => message;

xds.register();
const credentials = new xds.XdsChannelCredentials(grpc.credentials.createInsecure());
const client = new grpc.Client(process.argv[2], credentials);

readline.createInterface({ input: process.stdin }).on('line', (method) => {
  const deadline = Date.now() + TIMEOUT_MS;
  const call = client.makeUnaryRequest(method, bytes, bytes, Buffer.alloc(0), { deadline }, (error, body) => {
    const answer = {
      code: grpc.status[error ? error.code : grpc.status.OK],
      peer: call.getPeer(),
      body: body ? body.toString('base64') : '',
      text: error ? error.details : '',
    };
    process.stdout.write(`${JSON.stringify(answer)}\n`);
  });
});
