# The Consul agent of a node of docker-compose.yml; its name and address are on the command line, its token and
# the gossip key come from secrets/.
server             = false
datacenter         = "dc1"
data_dir           = "/consul/data"
client_addr        = "127.0.0.1" # for the processes of its node alone
retry_join         = ["consul"]
leave_on_terminate = true

ports = { http = -1, https = 8501, grpc = -1, grpc_tls = -1, dns = -1 }

acl = { enabled = true, default_policy = "deny", down_policy = "extend-cache" }

# Every process holds several watches.
limits = { http_max_conns_per_client = 2000 }

tls {
  defaults {
    ca_file         = "/run/consul/consul-ca.pem"
    cert_file       = "/run/consul/consul-node.pem"
    key_file        = "/run/consul/consul-node-key.pem"
    verify_outgoing = true
  }
  internal_rpc {
    verify_incoming        = true
    verify_server_hostname = true
  }
}

disable_update_check = true
