# The Consul server of docker-compose.yml. Its tokens and the gossip key come from secrets/, in consul-server.json.
server           = true
bootstrap_expect = 1
datacenter       = "dc1"
data_dir         = "/consul/data"
client_addr      = "0.0.0.0" # inside the network of the services; the host sees port 8501 on its loopback address
ui_config        = { enabled = true }
connect          = { enabled = true }

# Nothing without TLS, and no DNS: the mesh does not ask it.
ports = { http = -1, https = 8501, grpc = -1, grpc_tls = 8503, dns = -1, serf_wan = -1 }

# A token for everything; without one, not even a name.
acl = { enabled = true, default_policy = "deny", down_policy = "extend-cache" }

tls {
  defaults {
    ca_file         = "/run/consul/consul-ca.pem"
    cert_file       = "/run/consul/consul-server.pem"
    key_file        = "/run/consul/consul-server-key.pem"
    verify_outgoing = true
  }
  # Among agents both sides show a certificate, and only one named server.dc1.consul is a server.
  internal_rpc {
    verify_incoming        = true
    verify_server_hostname = true
  }
}

disable_update_check = true
