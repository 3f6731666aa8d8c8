#!/bin/sh
# Gives Consul the policies of this folder and the tokens of secrets/; does nothing that is done already.
# Run by docker-compose.yml at each start, with the management token in CONSUL_HTTP_TOKEN_FILE.
set -eu
here=$(dirname "$0")
secrets=${1:-/run/secrets}

token() { # FILE ARGUMENT...: a token with the secret in a file
  file=$1
  shift
  if ! CONSUL_HTTP_TOKEN_FILE=$file consul acl token read -self >/dev/null 2>&1; then
    consul acl token create -secret="$(cat "$file")" -description="$(basename "$file")" "$@" >/dev/null
    echo "created $(basename "$file")"
  fi
}

policy() { # NAME, rules from stdin
  rules=$(cat)
  if consul acl policy read -name="$1" >/dev/null 2>&1; then
    consul acl policy update -name="$1" -rules="$rules" >/dev/null
  else
    consul acl policy create -name="$1" -rules="$rules" >/dev/null
  fi
}

# A server knows its leader a moment before it knows the management token.
attempts=60
until consul acl token read -self >/dev/null 2>&1; do
  attempts=$((attempts - 1))
  if [ "$attempts" -eq 0 ]; then
    consul acl token read -self >/dev/null # says why
    exit 1
  fi
  sleep 1
done

for node in consul node-a node-b; do
  token "$secrets/consul-token-$node" -node-identity="$node:dc1"
done
policy plexus-control <"$here/control.hcl"
token "$secrets/consul-token-control" -policy-name=plexus-control
for service in vectors storage search inference queueing knowledge edge; do
  sed "s/SERVICE/$service/" "$here/service.hcl" | policy "plexus-$service"
  token "$secrets/consul-token-$service" -policy-name="plexus-$service"
done
