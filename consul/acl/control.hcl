# What a control plane may do: it reads everything that it turns into xDS, and at the first start it writes the
# intentions and traffic policies that Plexus ships, for every service.
service_prefix "" {
  policy     = "write"
  intentions = "write"
}
node_prefix "" {
  policy = "read"
}
key_prefix "plexus/" {
  policy = "write"
}
