# What the process of one service may do; SERVICE is its name. It registers itself, gets a certificate for itself
# and no one else, and reads the rules about itself.
service "SERVICE" {
  policy     = "write"
  intentions = "read"
}

# Who else is there: a stop waits until every control plane has let go of the instance.
service_prefix "" {
  policy     = "read"
  intentions = "deny"
}
node_prefix "" {
  policy = "read"
}
